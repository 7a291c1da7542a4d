"""Compiling and loading the C kernels: what is built, what is refused, and what is said about it."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from qvd_core.ops.cpu import build, library

ROOT = Path(__file__).resolve().parents[2]
SMALL_SOURCE = (
    'unsigned qvd_abi(void); __attribute__((visibility("default"))) unsigned qvd_abi(void) { return QVD_ABI; }'
)

needs_compiler = pytest.mark.skipif(
    not build.is_supported() or not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here"
)
only_where_supported = pytest.mark.skipif(not build.is_supported(), reason="not Linux on x86-64")


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A folder of sources that compiles in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.c").write_text(SMALL_SOURCE)
    return folder


@needs_compiler
class TestBuild:
    def test_the_library_knows_its_sources(self, small_folder: Path) -> None:
        path = build.build(folder=small_folder)
        assert path == small_folder / build.LIBRARY_NAME
        built = ctypes.CDLL(str(path))
        built.qvd_abi.restype = ctypes.c_uint
        assert built.qvd_abi() == build.fingerprint(small_folder)

    def test_an_edited_source_has_another_fingerprint(self, small_folder: Path) -> None:
        before = build.fingerprint(small_folder)
        (small_folder / "small.h").write_text("")
        with_header = build.fingerprint(small_folder)
        (small_folder / "small.c").write_text(SMALL_SOURCE + "\n")
        assert len({before, with_header, build.fingerprint(small_folder)}) == 3

    def test_the_file_appears_whole_or_not_at_all(self, small_folder: Path) -> None:
        path = build.build(folder=small_folder)
        before = path.read_bytes()
        (small_folder / "small.c").write_text("this is not C")
        with pytest.raises(build.BuildError, match=r"failed with exit code 1: .*error"):
            build.build(folder=small_folder)
        assert path.read_bytes() == before
        assert sorted(file.name for file in small_folder.iterdir()) == [build.LIBRARY_NAME, "small.c"]

    def test_no_compiler(self, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(small_folder))
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
        with pytest.raises(build.BuildError, match="no C compiler: cc, gcc, clang not found; install gcc"):
            build.build(folder=small_folder)

    def test_the_chosen_compiler_is_the_only_one(self, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "no-such-compiler -m64")
        with pytest.raises(build.BuildError, match="no-such-compiler -m64 not found"):
            build.build(folder=small_folder)
        monkeypatch.setenv("CC", shutil.which("false") or "false")
        with pytest.raises(build.BuildError, match="failed with exit code 1: it said nothing"):
            build.build(folder=small_folder)
        assert not (small_folder / build.LIBRARY_NAME).exists()

    def test_a_folder_that_cannot_be_written(self, small_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(build.BuildError, match="cannot write to"):
            build.build(tmp_path / "missing" / "library.so", small_folder)

    def test_no_sources(self, tmp_path: Path) -> None:
        with pytest.raises(build.BuildError, match="no C files in"):
            build.build(folder=tmp_path)


def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not build.is_supported()
    with pytest.raises(build.BuildError, match=r"need Linux on x86-64, this is .* on arm64"):
        build.build()


@only_where_supported
class TestLoad:
    def test_missing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert library.open_library(tmp_path / "none.so") is None
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "run without them, exact but slower; build it with `python -m qvd_core.ops.cpu.build`" in caplog.text

    @needs_compiler
    def test_stale(self, small_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert library.open_library(build.build(folder=small_folder)) is None
        assert "is stale" in caplog.text and "python -m qvd_core.ops.cpu.build" in caplog.text

    @pytest.mark.parametrize("content", [b"", b"not a library"])
    def test_damaged(self, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "library.so").write_bytes(content)
        assert library.open_library(tmp_path / "library.so") is None
        assert "cannot be loaded" in caplog.text

    @needs_compiler
    def test_another_library(self, small_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        (small_folder / "small.c").write_text("int nothing(void); int nothing(void) { return QVD_ABI == 0; }")
        assert library.open_library(build.build(folder=small_folder)) is None
        assert "cannot be loaded" in caplog.text

    def test_said_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(library, "_loaded", [])
        monkeypatch.setattr(build, "FOLDER", tmp_path)
        assert library.load() is None and library.load() is None
        assert len(caplog.records) == 1


def test_other_platforms_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    caplog.set_level(logging.INFO)
    assert library.open_library(tmp_path / "none.so") is None
    assert "need Linux on x86-64: int8 layers run without them" in caplog.text


@needs_compiler
def test_built_and_loaded_without_installing(tmp_path: Path) -> None:
    """What someone does who cloned the repository: build, then use; PyTorch's threads are found."""
    package = tmp_path / "clone" / "qvd_core"
    # Without the matrix products, which take most of the time to compile.
    shutil.copytree(ROOT / "qvd_core", package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "gemm*.c"))
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    environment.pop("CC", None)
    environment.pop("QVD_CPU_ISA", None)
    built = subprocess.run(
        [sys.executable, str(package / "ops/cpu/build.py")], env=environment, capture_output=True, text=True, check=True
    )
    assert built.stdout.strip() == str(package / "ops/cpu" / build.LIBRARY_NAME)
    assert built.stderr == "", "the compiler warns"
    use = (
        "from qvd_core.ops.cpu import isa_name, library as l; print(isa_name(), l._find_parallel_region() is not None)"
    )
    used = subprocess.run(
        [sys.executable, "-c", use], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    name, found = used.stdout.split()
    assert name in {*library.ISA_CODES, "none"} and found == "True"


def test_the_module_builds_from_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build.py` runs by its path in an environment without PyTorch, and fails in one line."""
    monkeypatch.setenv("CC", "no-such-compiler")
    command = [sys.executable, "-I", "-S", str(ROOT / "qvd_core/ops/cpu/build.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("QVD's C kernels were not built: ") and result.stderr.count("\n") == 1


def test_the_hook_finds_build_without_its_package() -> None:
    """In pip's build environment there is no PyTorch, which `qvd_core` imports."""
    path = ROOT / "qvd_core/ops/cpu/hatch_hook.py"
    code = (
        "import importlib.util as u, sys; "
        f"spec = u.spec_from_file_location('hook', {str(path)!r}); hook = u.module_from_spec(spec); "
        "spec.loader.exec_module(hook); print(hook.load_build().LIBRARY_NAME, hook.wheel_tag(), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    name, tag, has_torch = result.stdout.split()
    assert (name, has_torch) == (build.LIBRARY_NAME, "False")
    assert tag.startswith("py3-none-") and tag.count("-") == 2
    assert importlib.util.find_spec("qvd_core") is not None
