"""The family entries on ComfyUI's own model classes, run by the interpreter that runs ComfyUI."""

import os
import re
import subprocess
from typing import Any

import pytest

from tests.comfyui.server import ROOT, comfyui_path, comfyui_python

pytestmark = pytest.mark.comfyui
FILE = "tests/comfyui/test_families_real.py"


def test_the_entries_hold_for_the_real_classes(figure: Any) -> None:
    path = comfyui_path()
    if path is None:
        pytest.skip("COMFYUI_PATH is not set: no test of the real ComfyUI ran")
    python = comfyui_python(path)
    if subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
        pytest.skip(f"pytest is missing in ComfyUI's environment: {FILE} did not run")
    command = [python, "-m", "pytest", "-m", "comfyui", "--noconftest", "-q", "-p", "no:cacheprovider", FILE]
    environment = os.environ | {"COMFYUI_PATH": str(path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-500:]
    figure("tests", re.sub(r" in [0-9].*", "", last).strip("= "))
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
