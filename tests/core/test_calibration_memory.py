"""Calibration of a 14-billion-parameter model: what is kept depends on the channels, never on prompts or steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from qvd_core import QuantSpec, find_family
from qvd_core.observation import CALLS_KEPT, Observation
from qvd_core.observe import ROWS_KEPT
from qvd_core.plan import quantizable_layers
from qvd_core.spec import MOST_BUCKETS
from tests.core.conftest import Denoiser
from tests.core.video_clock import set_clock

FRAMES = 21
ROWS = 4 * FRAMES  # per call, more than an observer samples of one
STATED_LIMIT = 5e9  # bytes, for the whole of Wan 14B


@pytest.fixture(scope="module")
def fourteen_billion() -> Observation:
    """Wan 14B (40 blocks of 40 heads x 128), without a byte of weights."""
    with torch.device("meta"):
        model = WanTransformer3DModel()
    assert 14e9 < sum(parameter.numel() for parameter in model.parameters()) < 15e9
    family = find_family(model)
    return Observation(model, family, quantizable_layers(model, family, QuantSpec()))


def feed(observation: Observation, name: str, steps: int, prompts: int = 1) -> int:
    """Run one observer over a sampling schedule of synthetic inputs; bytes it then holds."""
    observer = observation.inputs[name]
    width = observation.layers[name].in_features
    x = torch.ones(1, ROWS, width)
    for prompt in range(prompts):
        for step in range(steps):
            set_clock(observation.clock, 1000.0 - step * 17 - prompt, 1, FRAMES)
            observer.observe(x)
    return observer.memory_bytes()


def largest(width: int) -> int:
    """Bytes of a full observer: ranges per bucket and frame, the sum in float64, the sample with origin and key."""
    return 2 * (MOST_BUCKETS + FRAMES) * width * 4 + width * 8 + ROWS_KEPT * (width + 3) * 4


def test_the_whole_model_stays_below_the_stated_limit(fourteen_billion):
    widths = {name: layer.in_features for name, layer in fourteen_billion.layers.items()}
    measured: dict[int, int] = {}
    for name in fourteen_billion.inputs:
        width = widths[name]
        if fourteen_billion.inputs[name].frame_order is not None and width not in measured:
            measured[width] = feed(fourteen_billion, name, steps=40)
            assert measured[width] == largest(width)  # 40 timesteps fill every bucket
    assert measured.keys() == {5120, 13824}
    total = sum(largest(widths[name]) for name in fourteen_billion.inputs)
    assert len(fourteen_billion.inputs) == 40 * 7 and total < STATED_LIMIT


def test_neither_steps_nor_prompts_make_it_grow(fourteen_billion):
    name = "blocks.3.attn1.to_q"
    first = feed(fourteen_billion, name, steps=40)
    assert feed(fourteen_billion, name, steps=60, prompts=2) == first
    assert len(fourteen_billion.inputs[name].ranges.buckets) == MOST_BUCKETS


def test_of_a_small_model_as_it_samples(wan: Denoiser):
    family = find_family(wan.model)
    observation = Observation(wan.model, family, quantizable_layers(wan.model, family, QuantSpec()))
    sizes = []
    with observation.watching(), torch.no_grad():
        for repetition in range(3):
            for timestep in range(1000, 0, -25):
                wan.forward(wan.model, timestep - 0.1 * repetition)
            sizes.append(observation.memory_bytes())
    assert sizes[1] == sizes[2]  # by then even the short text inputs have filled their samples
    assert len(observation.calls) == CALLS_KEPT
    timesteps = {float(kwargs["timestep"][0]) for _, kwargs in observation.calls}
    assert len(timesteps) == CALLS_KEPT and min(timesteps) < 900  # from the whole run: it began at 1000, 975, 950, 925
    assert not any(isinstance(module, nn.Module) and module._forward_pre_hooks for module in wan.model.modules())
