"""What ran on the real ComfyUI: counted aloud at the end of a session, and written as a document.

`QVD_COMFYUI_LOG=docs/comfyui-tests.md` names the document.
"""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES: dict[str, list[tuple[str, str]]] = {}
ABOUT: dict[str, str] = {}
_selected: set[str] = set()
_deselected: set[str] = set()
_results: dict[str, tuple[str, float]] = {}


def processor() -> str:
    """The name of this machine's processor and its number of cores."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.machine()}, {os.cpu_count()} cores"


def about(server: Any, client: Any) -> None:
    """Note the versions of the running server."""
    system = client.get("/system_stats")["system"]
    command = ["git", "-C", str(server.path), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    here = ["git", "-C", str(ROOT)]
    own = subprocess.run([*here, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = [*here, "status", "--porcelain", "--", "qvd_core", "qvd_nodes", "web", "__init__.py"]
    if subprocess.run(changed, capture_output=True, text=True).stdout.strip():
        own += ", with uncommitted changes"
    ABOUT.update(
        {
            "ComfyUI": f"{system['comfyui_version']}" + (f" (commit {commit})" if commit else ""),
            "QVD": own,
            "Python": str(system["python_version"]).split(" ")[0],
            "PyTorch": str(system["pytorch_version"]),
            "processor": processor() + ", one thread",
            "start of the server": f"{server.starts[0]:.0f} s",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
    )


def count(items: Iterable[Any]) -> None:
    """Note the tests that will run."""
    _selected.update(item.nodeid for item in items)


def left_out(items: Iterable[Any]) -> None:
    """Note the tests that were deselected."""
    _deselected.update(item.nodeid for item in items)


def result(report: Any) -> None:
    """Note how a test went; its fixtures count into its time."""
    if report.nodeid in _selected:
        outcome, seconds = _results.get(report.nodeid, ("passed", 0.0))
        worse = report.outcome if report.outcome != "passed" else outcome
        _results[report.nodeid] = (worse, seconds + report.duration)


def summary() -> Iterator[str]:
    """Lines for the terminal; none where no test of the real ComfyUI was collected."""
    total = len(_selected | _deselected)
    if not total:
        return
    ran = [nodeid for nodeid, (outcome, _) in _results.items() if outcome != "skipped"]
    needed = "" if os.environ.get("COMFYUI_PATH") else "; they need make test-comfyui COMFYUI_PATH=<checkout>"
    yield f"REAL COMFYUI: ran {len(ran)} of {total} tests{needed}"
    for nodeid in ran:
        for name, text in FIGURES.get(nodeid, []):
            yield f"  {nodeid.rpartition('::')[2]}: {name} {text}"


def document() -> str:
    """The summary as a Markdown document."""
    lines = ["# Tests against a real ComfyUI", ""]
    lines += [
        "Written by `make test-comfyui COMFYUI_PATH=<checkout>`: a headless server on the CPU with this node pack and"
    ]
    lines += ["tiny models with random weights in ComfyUI's own formats (`tests/comfyui/tiny_files.py`).", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in ABOUT.items()), ""]
    passed = sum(outcome == "passed" for outcome, _ in _results.values())
    seconds = sum(seconds for _, seconds in _results.values())
    lines += [f"{passed} of {len(_results)} tests passed, in {seconds:.0f} s.", ""]
    lines += ["| test | result | s | measured |", "| --- | --- | ---: | --- |"]
    for nodeid, (outcome, seconds) in _results.items():
        name = nodeid.rpartition("/")[2].replace(".py::", " / ").replace("::", " / ").removeprefix("test_server_")
        figures = ", ".join(f"{key} {text}" for key, text in FIGURES.get(nodeid, []))
        figures = " ".join(figures.replace("|", "/").split())
        lines.append(f"| {name.replace('test_', '').replace('_', ' ')} | {outcome} | {seconds:.1f} | {figures} |")
    return "\n".join(lines) + "\n"


def write(path: str) -> None:
    """Write the document, where any test ran."""
    if any(outcome != "skipped" for outcome, _ in _results.values()):
        Path(path).write_text(document())
