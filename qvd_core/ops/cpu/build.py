"""Compiles the C files of this folder into one shared library beside them; the standard library is enough.

Installing with pip does this where a C compiler is found. In a plain clone: `python -m qvd_core.ops.cpu.build`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY_NAME = "libqvd_cpu.so"
# -ffp-contract=off: a fused multiply-add rounds once where PyTorch rounds twice, and codes would differ.
FLAGS = (
    *("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
)
_TIME_LIMIT = 600  # seconds; a build takes a few


class BuildError(RuntimeError):
    """The library could not be compiled; the message says why in one line."""


def is_supported() -> bool:
    """Can the C files run on this platform? They are written for Linux on 64-bit x86."""
    return sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32


def sources(folder: Path = FOLDER) -> list[Path]:
    """The C files that are compiled, in a fixed order."""
    return sorted(folder.glob("*.c"))


def fingerprint(folder: Path = FOLDER) -> int:
    """32 bits that change with any C file, header or flag: a library with another number is stale."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


def find_compiler() -> list[str]:
    """The command of the C compiler: $CC where it is set, else Python's own, cc, gcc or clang.

    Raises BuildError when there is none.
    """
    chosen = os.environ.get("CC")
    candidates = [chosen] if chosen else [str(sysconfig.get_config_var("CC") or ""), "cc", "gcc", "clang"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    tried = ", ".join(dict.fromkeys(filter(None, candidates)))
    raise BuildError(f"no C compiler: {tried} not found; install gcc or clang, or set CC.")


def build(output: Path | None = None, folder: Path = FOLDER) -> Path:
    """Compile every C file of `folder` into `output` (default: libqvd_cpu.so in it) and return its path.

    The file appears whole or not at all: processes that have loaded an older one are not disturbed.
    Raises BuildError when the platform is not supported, without a compiler, or when it fails.
    """
    if not is_supported():
        raise BuildError(f"the C kernels need Linux on x86-64, this is {sys.platform} on {platform.machine()}.")
    output = output or folder / LIBRARY_NAME
    compiler = find_compiler()
    files = [str(file) for file in sources(folder)]
    if not files:
        raise BuildError(f"no C files in {folder}: the installation is incomplete, install QVD again.")
    try:
        handle, temporary = tempfile.mkstemp(prefix=".libqvd_cpu-", suffix=".so", dir=output.parent)
    except OSError as error:
        raise BuildError(f"cannot write to {output.parent}: {error}.") from error
    os.close(handle)
    try:
        _compile([*compiler, *FLAGS, f"-DQVD_ABI={fingerprint(folder)}u", "-o", temporary, *files])
        os.chmod(temporary, 0o755)  # mkstemp's file is for its owner only
        os.replace(temporary, output)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return output


def _compile(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {command[0]} could not be run: {error}.") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        said = lines[0].strip() if lines else "it said nothing"
        raise BuildError(f"the compiler {command[0]} failed with exit code {result.returncode}: {said}")
    if result.stderr:
        sys.stderr.write(result.stderr)  # warnings, for whoever edits the C files


def main() -> int:
    """Build beside the sources and say where; exit code 1 and one line when it fails."""
    try:
        print(build())
    except BuildError as error:
        print(f"QVD's C kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
