"""Build hook of hatchling: compiles the C kernels when QVD is installed, where a compiler is found.

QVD_BUILD_CPU=0 leaves them out, QVD_BUILD_CPU=1 turns a failure into an error; without it a failure is one warning and
the wheel is pure Python. Runs in pip's build environment, which has hatchling and no PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any


def load_build() -> ModuleType:
    """`build.py` beside this file, by its path: importing its package would import torch."""
    spec = importlib.util.spec_from_file_location("qvd_cpu_build", Path(__file__).with_name("build.py"))
    if spec is None or spec.loader is None:
        raise ImportError("build.py is missing beside the build hook: the source distribution is incomplete.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel_tag() -> str:
    """Any Python 3, this platform only: the library knows nothing of Python."""
    return "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def get_build_hook() -> type:
    """What hatchling asks this file for."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class KernelsHook(BuildHookInterface[Any]):
        """Adds the library to a wheel; for an editable install it is left in the source folder."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            wanted = os.environ.get("QVD_BUILD_CPU", "")
            if wanted not in ("", "0", "1"):
                raise ValueError(f"QVD_BUILD_CPU={wanted!r}: use 0 (leave the C kernels out) or 1 (insist on them).")
            if wanted == "0":
                return
            build = load_build()
            self._folder = tempfile.TemporaryDirectory(prefix="qvd-build-")
            editable = version == "editable"
            output = (build.FOLDER if editable else Path(self._folder.name)) / build.LIBRARY_NAME
            try:
                build.build(output)
            except build.BuildError as error:
                if wanted == "1":
                    raise
                self.app.display_warning(f"QVD's C kernels are left out, int8 runs emulated: {error}")
                return
            if not editable:
                inside = build.FOLDER.relative_to(Path(self.root).resolve()) / build.LIBRARY_NAME
                build_data["force_include"][str(output)] = inside.as_posix()
            build_data["pure_python"] = False
            build_data["tag"] = wheel_tag()

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            if hasattr(self, "_folder"):
                self._folder.cleanup()

    return KernelsHook
