"""One real server for the session, and the summary of what ran on it (`comfyui_log.py`)."""

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.comfyui import comfyui_log
from tests.comfyui.client import Client
from tests.comfyui.server import TEST_PACK, Server, comfyui_path

MARKER = "comfyui"
# Builds ComfyUI's models in its own process: `test_server_families.py` runs it where ComfyUI's packages are.
collect_ignore = [] if importlib.util.find_spec("einops") else ["test_families_real.py"]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A running server with the pack, the test nodes and the tiny models; all its files go with it."""
    path = comfyui_path()
    if path is None:
        pytest.skip("COMFYUI_PATH is not set: no test of the real ComfyUI ran")
    server = Server(path)
    server.prepare()
    script = TEST_PACK.parent / "tiny_files.py"
    made = subprocess.run(
        [server.python, str(script), str(path), str(server.base / "models")],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr.decode()
    with server:
        comfyui_log.about(server, Client(server.url))
        yield server


@pytest.fixture
def client(server: Server) -> Client:
    """A client of the running server, started again where a test has ended it."""
    if not server.alive():
        server.restart()
    return Client(server.url)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """`figure(name, value)` prints a measured value and puts it into the summary."""

    def record(name: str, value: object) -> None:
        text = f"{value:.2f}" if isinstance(value, float) else str(value)
        print(f"  {name}: {text}")
        comfyui_log.FIGURES.setdefault(request.node.nodeid, []).append((name, text))

    return record


def pytest_collection_finish(session: pytest.Session) -> None:
    comfyui_log.count(item for item in session.items if item.get_closest_marker(MARKER))


def pytest_deselected(items: list[pytest.Item]) -> None:
    comfyui_log.left_out(item for item in items if item.get_closest_marker(MARKER))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    comfyui_log.result(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in comfyui_log.summary():
        terminalreporter.write_line(line, bold=True, yellow=True)
    path = os.environ.get("QVD_COMFYUI_LOG")
    if path:
        comfyui_log.write(path)
