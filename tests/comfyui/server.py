"""A real, headless ComfyUI server on the CPU, for tests: started, restarted and stopped by process id.

`COMFYUI_PATH` names the checkout; `COMFYUI_PYTHON` its interpreter (default: `venv` or `.venv` in it, else ours).
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
TEST_PACK = Path(__file__).resolve().parent / "test_pack"
PACK_FOLDER = "qvd"
MODEL_FOLDERS = ("checkpoints", "clip", "diffusion_models", "loras", "qvd_scales", "text_encoders", "vae")
BASE_FOLDERS = ("custom_nodes", "input", "output", "temp", "user")
FLAGS = (
    *("--cpu", "--listen", "127.0.0.1", "--database-url", "sqlite:///:memory:"),
    *("--disable-api-nodes", "--disable-auto-launch", "--cache-classic"),
)
STARTUP_SECONDS = 240.0
STOP_SECONDS = 20.0
KERNELS = "qvd_core/ops/cpu/libqvd_cpu.so"


class ServerError(RuntimeError):
    """The server did not start, or is gone; the message ends with the tail of its log."""


def comfyui_path() -> Path | None:
    """The checkout that `COMFYUI_PATH` names, or None where the variable is empty."""
    text = os.environ.get("COMFYUI_PATH", "")
    if not text:
        return None
    path = Path(text).expanduser().resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise ServerError(f"COMFYUI_PATH={text} holds no main.py and comfy/; name a ComfyUI checkout")
    return path


def comfyui_python(path: Path) -> str:
    """The interpreter that runs the checkout at `path`."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return named
    for candidate in (path / "venv" / "bin" / "python", path / ".venv" / "bin" / "python"):
        if candidate.is_file():
            return str(candidate)
    return sys.executable


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def tracked_files(root: Path) -> list[str]:
    """What a clone of `root` would hold, and what git does not ignore: paths relative to it."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True).stdout.decode()
    return sorted(name for name in listed.split("\0") if name and (root / name).is_file())


def export(target: Path, *, root: Path = ROOT, kernels: bool = True) -> None:
    """Copy a clean tree of the repository to `target`, as a user's clone; with the compiled kernels where they are."""
    for name in [*tracked_files(root), *([KERNELS] if kernels and (root / KERNELS).is_file() else [])]:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy)


def end_with_parent() -> None:
    """Let Linux end this process when its parent ends, even by a signal that leaves no time to clean up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Server:
    """A context manager around one server; `base` is its base directory, `url` its address.

    `with_pack=False` leaves QVD out: the stock ComfyUI. The nodes of `test_pack/` are always there. A base directory
    that is given is kept; without one a temporary one is made and removed.
    """

    def __init__(
        self,
        path: Path,
        *,
        base: Path | None = None,
        with_pack: bool = True,
        flags: Iterable[str] = (),
        environment: dict[str, str] | None = None,
        startup_seconds: float = STARTUP_SECONDS,
    ) -> None:
        self.path = path
        self.python = comfyui_python(path)
        self.with_pack = with_pack
        self.flags = tuple(flags)
        self.environment = dict(environment or {})
        self.startup_seconds = startup_seconds
        self.port = 0
        self.starts: list[float] = []  # seconds that each start took
        self._temporary = tempfile.TemporaryDirectory(prefix="qvd-comfyui-") if base is None else None
        self.base = Path(self._temporary.name) if self._temporary else Path(str(base))
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[str] = []
        self._reader: threading.Thread | None = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:<port>` of the running server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything that the server printed, over all its starts."""
        return "".join(self._lines)

    @property
    def cache(self) -> Path:
        """The scale cache of this server; it survives a restart."""
        return self.base / "qvd-cache"

    def folder(self, name: str) -> Path:
        """`models/<name>`, or one of the base directory's own folders."""
        return self.base / name if name in BASE_FOLDERS else self.base / "models" / name

    def prepare(self) -> None:
        """Make the folders (a missing `custom_nodes` ends ComfyUI) and put the packs in their place."""
        for name in (*BASE_FOLDERS, *MODEL_FOLDERS):
            self.folder(name).mkdir(parents=True, exist_ok=True)
        nodes = self.folder("custom_nodes")
        shutil.copytree(
            TEST_PACK, nodes / "qvd_test_pack", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        pack = nodes / PACK_FOLDER
        if pack.exists():
            shutil.rmtree(pack)
        if self.with_pack:
            export(pack)

    def use_pack(self, with_pack: bool) -> None:
        """Take QVD out of `custom_nodes`, or put the same files back; takes effect with the next start."""
        self.with_pack = with_pack
        away, pack = self.base / "qvd-away", self.folder("custom_nodes") / PACK_FOLDER
        source, target = (away, pack) if with_pack else (pack, away)
        if source.exists():
            source.rename(target)

    def start(self) -> None:
        """Start the server and wait until it answers; raises `ServerError` with the log's tail where it does not."""
        self.port = free_port()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("QVD_", "PYTEST_"))}
        environment |= {"OMP_NUM_THREADS": "1", "QVD_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"} | self.environment
        command = [self.python, "-u", str(self.path / "main.py"), *FLAGS, "--port", str(self.port)]
        began = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--base-directory", str(self.base), *self.flags],
            cwd=self.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
        # A pipe, not a file: a test may limit the size of the files that the server can write.
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        while not self._answers():
            if self._process.poll() is not None:
                self._reader.join(5.0)
                raise ServerError(
                    f"the server ended with code {self._process.returncode} before it answered{self.tail()}"
                )
            if time.monotonic() - began > self.startup_seconds:
                self.stop()
                raise ServerError(f"the server did not answer within {self.startup_seconds:.0f} s{self.tail()}")
            time.sleep(0.25)
        self.starts.append(time.monotonic() - began)

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                self._lines.append(line.decode(errors="replace"))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log, for an error message."""
        return "".join(["; its log ends:\n", *self._lines[-lines:]])

    def alive(self) -> bool:
        """Does the process run and answer?"""
        return self._process is not None and self._process.poll() is None and self._answers()

    def stop(self) -> None:
        """End the process by its id: politely, then by force. Does nothing where there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._reader is not None:
            self._reader.join(5.0)

    def restart(self) -> None:
        """Stop and start again with the same base directory: files stay, what was in memory is gone."""
        self.stop()
        self.start()

    def __enter__(self) -> "Server":
        try:
            self.prepare()
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()
