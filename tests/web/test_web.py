"""Runs what checks the front end: ESLint, the tests of its modules, the recorded page in a browser, the real front end.

These need node, `npm ci`, and for the last two a Chromium; what is missing is said aloud, in pytest's summary.
"""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 600


def leave_out(what: str, reason: str) -> None:
    """Skip, and say so where nobody can miss it."""
    warnings.warn(f"{what} did NOT run: {reason}", stacklevel=2)
    pytest.skip(reason)


def run(*command: str, seconds: float = SECONDS) -> None:
    """Run a script of package.json; the test fails with its output."""
    name = f"npm run {' '.join(command)}"
    if shutil.which("npm") is None:
        leave_out(name, "node and npm are not installed")
    if not (ROOT / "node_modules" / "eslint").is_dir():
        leave_out(name, "run `npm ci` first")
    done = subprocess.run(
        ["npm", "run", "--silent", *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


def need_chromium(what: str) -> None:
    """Skip without a browser; `QVD_CHROMIUM` names one that is not on the path."""
    if os.environ.get("QVD_CHROMIUM") is None and not any(shutil.which(name) for name in CHROMIUM):
        leave_out(what, "no Chromium (apt-get install chromium, or name one in QVD_CHROMIUM)")


def test_the_front_end_passes_its_linter() -> None:
    run("lint")


def test_the_modules_of_the_front_end() -> None:
    run("test")


def test_the_recorded_page_in_a_browser() -> None:
    need_chromium("the recorded page")
    run("browser")


@pytest.mark.comfyui
def test_the_real_front_end_on_a_real_server() -> None:
    need_chromium("the real front end")
    if not os.environ.get("COMFYUI_PATH"):
        leave_out("the real front end", "COMFYUI_PATH is not set")
    run("real", seconds=3 * SECONDS)
