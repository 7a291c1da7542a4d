"""Fixtures: the tiny pipelines saved as ordinary diffusers folders, and a cache of each test's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, WanPipeline

from qvd_diffusers import QVDConfig
from tests.diffusers.tiny import tiny_animate_diff, tiny_wan
from tests.diffusers.tiny_pipelines import PIPELINES, tiny_wan22

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved full-precision `WanPipeline`. Read-only: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def animate_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved full-precision `AnimateDiffPipeline` with a `UNetMotionModel`: the paper's kind of model."""
    folder = tmp_path_factory.mktemp("animate")
    tiny_animate_diff().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan22_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved full-precision `WanPipeline` with two experts, `transformer` and `transformer_2`. Read-only."""
    folder = tmp_path_factory.mktemp("wan22")
    tiny_wan22().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `PIPELINES`, saved in full precision when first asked for. Read-only."""

    @functools.cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        PIPELINES[name].build().save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def quantized_folder(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of one of `PIPELINES`, quantized by `QVDConfig()`. Read-only."""

    @functools.cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(f"{name}-int8")
        DiffusionPipeline.from_pretrained(pipeline_folder(name), quantization_config=QVDConfig()).save_pretrained(path)
        return path

    return folder


@pytest.fixture
def wan_pipe(wan_folder: Path) -> WanPipeline:
    """A full-precision pipeline of one's own."""
    return WanPipeline.from_pretrained(wan_folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("QVD_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
