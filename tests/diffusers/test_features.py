"""After loading, a quantized pipeline stands whatever its users do to it: docs/features.md, cell by cell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from tests.diffusers import features_adapters, features_caching, features_memory  # noqa: F401  (they register the features)
from tests.diffusers.features import FEATURES, Bench, Feature, Outcome, distance
from tests.diffusers.tiny_pipelines import PIPELINES

NEWEST = diffusers.__version__ >= "0.42"

SEQUENTIAL = "enable_sequential_cpu_offload (on a CPU)"
STREAMS = "enable_group_offload with use_stream (on a CPU)"
CHANNELS_LAST = "denoiser.to(memory_format=channels_last)"
HALF_BATCH = "FasterCache of the unconditional branch"
UPSTREAM = {
    *((SEQUENTIAL, kind) for kind in PIPELINES),
    *((STREAMS, kind) for kind in PIPELINES),
    *((CHANNELS_LAST, kind) for kind in ("Wan", "HunyuanVideo", "SVD")),
    *((HALF_BATCH, kind) for kind in ("Wan", "HunyuanVideo", "LTX")),
    *(("SeaCache", kind) for kind in ("HunyuanVideo", "LTX", "CogVideoX")),
    *(("apply_layer_skip", kind) for kind in ("AnimateDiff", "SVD")),
    ("VAE tiling", "SVD"),
    ("VAE slicing", "SVD"),
}
"""Cells in which diffusers 0.42 fails, or does nothing, in full precision as well."""


@pytest.fixture(scope="module")
def bench(pipeline_folder: Callable[[str], Path], quantized_folder: Callable[[str], Path]) -> Callable[[str], Bench]:
    return functools.cache(lambda kind: Bench(kind, pipeline_folder(kind), quantized_folder(kind)))


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("title", FEATURES)
def test_the_feature_works_or_diffusers_itself_cannot(
    title: str, kind: str, bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    found = bench(kind).outcome(title, tmp_path)
    if found.verdict == "not offered":
        pytest.skip(f"this diffusers does not offer it to {kind}")
    allowed = ("ok", "upstream") if not NEWEST else ("upstream",) if (title, kind) in UPSTREAM else ("ok",)
    assert found.verdict in allowed, found


class TestTheJudge:
    """It must be able to say no."""

    @pytest.fixture
    def wan(self, bench: Callable[[str], Bench]) -> Bench:
        return bench("Wan")

    def tried(self, wan: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: object) -> Outcome:
        monkeypatch.setitem(FEATURES, "tried", Feature("tried", **settings))  # type: ignore[arg-type]
        return wan.outcome("tried", tmp_path)

    def test_another_result_is_wrong(self, wan: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def damage(kind: object, pipe: object, scratch: Path) -> None:
            pipe.transformer.blocks[0].ffn.net[2].weight_scale *= 1.5  # type: ignore[attr-defined]

        assert self.tried(wan, monkeypatch, tmp_path, apply=damage, unchanged=False).verdict == "wrong"

    def test_a_changed_tensor_is_wrong(self, wan: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def touch(kind: object, pipe: object, scratch: Path) -> None:
            pipe.transformer.blocks[0].ffn.net[2].weight_scale *= 1 + 1e-6  # type: ignore[attr-defined]

        found = self.tried(wan, monkeypatch, tmp_path, apply=touch)
        assert found.verdict == "wrong" and "blocks.0.ffn.net.2.weight_scale" in found.detail

    def test_an_error_of_the_quantized_pipeline_alone_is_wrong(
        self, wan: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        found = self.tried(wan, monkeypatch, tmp_path, apply=lambda kind, pipe, scratch: pipe.transformer.half())
        assert found.verdict == "wrong" and "half" in found.detail

    def test_infinite_for_nan_and_for_another_shape(self) -> None:
        ones = torch.ones(2, 3)
        assert distance(ones * float("nan"), ones) == distance(ones[:1], ones) == float("inf")
        assert distance(ones, ones) == 0.0
