"""`torch.compile` of a quantized denoiser: one program, the same result, and no second one for other steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.diffusers.features import CPU, distance
from tests.diffusers.tiny_pipelines import PIPELINES

SLOW = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("HunyuanVideo", "LTX", "CogVideoX", "AnimateDiff", "SVD")
]
REGIONAL = SLOW[:2]  # the other classes name no repeated blocks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled_like_eager(kind: str, folder: Path, compile: Callable[[Any], None]) -> None:
    tiny = PIPELINES[kind]
    pipe = DiffusionPipeline.from_pretrained(folder)
    eager = tiny.sample(pipe, output_type="latent", num_inference_steps=2)
    compile(tiny.model(pipe))
    compiled = tiny.sample(pipe, output_type="latent", num_inference_steps=2)
    assert distance(compiled, eager) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        tiny.sample(pipe, output_type="latent", num_inference_steps=3)  # other timesteps, more of them


def whole(model: Any) -> None:
    model.compile(fullgraph=True, backend="eager")


def blocks(model: Any) -> None:
    model.compile_repeated_blocks(fullgraph=True, backend="eager")


@pytest.mark.parametrize("kind", ["Wan", *SLOW])
def test_the_whole_denoiser_is_one_program(kind: str, quantized_folder: Callable[[str], Path]) -> None:
    compiled_like_eager(kind, quantized_folder(kind), whole)


@pytest.mark.parametrize("kind", ["Wan", *REGIONAL])
def test_repeated_blocks_share_their_programs(kind: str, quantized_folder: Callable[[str], Path]) -> None:
    compiled_like_eager(kind, quantized_folder(kind), blocks)


@pytest.mark.slow
def test_group_offloading_and_compiled_blocks(quantized_folder: Callable[[str], Path]) -> None:
    """Offloading breaks the programs at every layer, in full precision too; the result stays."""
    tiny = PIPELINES["Wan"]
    pipe = DiffusionPipeline.from_pretrained(quantized_folder("Wan"))
    eager = tiny.sample(pipe, output_type="latent")
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert distance(tiny.sample(pipe, output_type="latent"), eager) < 1e-5
