"""The committed miniatures: stock pipelines that show what they are asked for, and lose next to nothing in int8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from examples.moving_digits import sampling
from examples.moving_digits.metric import load_metric
from qvd_core.layers import QuantizedLayer
from qvd_core.quality import psnr
from qvd_diffusers import QVDConfig, calibrate

CLIPS = 2
DENOISERS = {"wan": "transformer", "unet": "unet"}
STOCK = {"wan": "WanPipeline", "unet": "AnimateDiffPipeline"}


@dataclass(frozen=True)
class Case:
    """One miniature, its clips in full precision and in int8, and the int8 pipeline saved to a folder."""

    name: str
    folder: Path
    full: DiffusionPipeline
    quantized: DiffusionPipeline
    saved: Path
    reference: Tensor
    int8: Tensor

    def sample(self, pipe: DiffusionPipeline) -> Tensor:
        return _sample(pipe, self.folder)


def _sample(pipe: DiffusionPipeline, folder: Path) -> Tensor:
    seeds = sampling.held_out_seeds(CLIPS)
    return sampling.sample_video(pipe, sampling.held_out_prompts(CLIPS), seeds, sampling.load_call(folder))


@pytest.fixture(scope="module", params=sampling.MINIATURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = sampling.miniature(request.param)
    full = sampling.load_pipeline(folder)
    call: dict[str, Any] = sampling.load_call(folder)
    scales = calibrate(full, sampling.calibration_prompts()[:2], cache=False, progress=False, **call)
    quantized = sampling.load_pipeline(folder, quantization_config=QVDConfig(scales=scales))
    saved = tmp_path_factory.mktemp(request.param)
    quantized.save_pretrained(saved)
    yield Case(request.param, folder, full, quantized, saved, _sample(full, folder), _sample(quantized, folder))


def test_the_pipeline_is_stock_and_draws_what_the_caption_says(case: Case) -> None:
    assert type(case.full).__name__ == STOCK[case.name]
    digit, _ = load_metric().classify(case.reference * 2 - 1)
    assert torch.equal(digit, sampling.labels_of(sampling.held_out_prompts(CLIPS))[0])


def test_int8_is_close_to_full_precision(case: Case) -> None:
    assert psnr(case.int8, case.reference).mean() >= 38.0


def test_other_noise_is_far_from_full_precision(case: Case) -> None:
    """What the 38 dB are worth: two clips of one caption are nowhere near each other."""
    assert psnr(case.reference[:1], case.reference[1:]).mean() < 25.0


def test_saved_weights_take_less_than_a_third(case: Case) -> None:
    before, after = (
        sum(file.stat().st_size for file in (folder / DENOISERS[case.name]).glob("*.safetensors"))
        for folder in (case.folder, case.saved)
    )
    assert after <= before * (0.30 if case.name == "wan" else 0.45)  # a UNet this narrow is mostly norms and biases


def test_reload_is_bit_identical(case: Case) -> None:
    again = sampling.load_pipeline(case.saved)
    before = getattr(case.quantized, DENOISERS[case.name])
    after = getattr(again, DENOISERS[case.name])
    assert any(isinstance(module, QuantizedLayer) for module in after.modules())
    state, loaded = before.state_dict(), after.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) and state[name].dtype == loaded[name].dtype for name in state)
    assert torch.equal(case.sample(again), case.int8)


def test_all_committed_weights_stay_within_40_megabytes() -> None:
    files = sampling.miniature("wan").parent.rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) <= 40e6
