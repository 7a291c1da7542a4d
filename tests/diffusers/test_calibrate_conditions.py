"""Calibrating pipelines that take more than a prompt: images, videos, whole sets of arguments per sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanVideoToVideoPipeline
from PIL import Image

from qvd_diffusers import QVDConfig, QVDError, calibrate
from tests.diffusers.tiny import PROMPTS, WAN_CALL
from tests.diffusers.tiny_pipelines import PIPELINES


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


@pytest.fixture
def svd(pipeline_folder: Callable[[str], Path]) -> Any:
    return DiffusionPipeline.from_pretrained(pipeline_folder("SVD"))


SVD_CALL = PIPELINES["SVD"].call


def test_a_pipeline_without_prompts_is_given_images(
    svd: Any, pipeline_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [{"image": image(seed)} for seed in range(2)]
    first = calibrate(svd, samples, config=QVDConfig(activation="static"), **SVD_CALL)
    again = calibrate(svd, samples, config=QVDConfig(activation="static"), **SVD_CALL)
    printed = capsys.readouterr().out
    assert "Using cached scales" in printed and "2 prompts" in printed
    assert first.layers.keys() == again.layers.keys() and first.calibrated_on["samples"] == 2
    other = calibrate(svd, [{"image": image(7)}, samples[1]], config=QVDConfig(activation="static"), **SVD_CALL)
    assert "Using" not in capsys.readouterr().out
    assert any(not torch.equal(first.layers[name].input_max, other.layers[name].input_max) for name in first.layers)
    pipe = DiffusionPipeline.from_pretrained(
        pipeline_folder("SVD"), quantization_config=QVDConfig(activation="static", scales=first)
    )

    def frames(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(**samples[0], generator=generator, output_type="latent", **SVD_CALL).frames

    reference = frames(svd)
    assert (frames(pipe) - reference).std() < 0.1 * reference.std()


def test_each_sample_may_bring_a_prompt_and_a_video(wan_folder: Path) -> None:
    parts = DiffusionPipeline.from_pretrained(wan_folder).components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    call = {name: value for name, value in WAN_CALL.items() if name != "num_frames"}
    samples = [{"prompt": prompt, "video": [image(5 * n + k) for k in range(5)]} for n, prompt in enumerate(PROMPTS)]
    scales = calibrate(pipe, samples, progress=False, **call)
    assert scales.layers and scales.calibrated_on["prompts"] == PROMPTS


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{}], r"prompts\[0\] must name arguments"),
        ([{"image": image(0), "sound": 1}], "takes no argument 'sound'"),
        ([{"image": image(0), "generator": None}], "the generator follows from the seed"),
        ([{"image": image(0), "num_frames": 3}], "'num_frames' follows from prompts and seed"),
        (["a prompt"], "takes no prompt: pass a function of the pipeline"),
        ([{"image": image(0)}, "a prompt"], r"prompts\[0\] must be a string, or all of them sets"),
    ],
)
def test_senseless_samples_are_refused(svd: Any, samples: Any, message: str) -> None:
    with pytest.raises(QVDError, match=message):
        calibrate(svd, samples, progress=False, **SVD_CALL)
