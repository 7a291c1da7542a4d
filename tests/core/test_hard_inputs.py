"""Calibration and quantization where the input is empty, constant, dead, short, or of another type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, calibrate_model, quantize_model
from tests.core.conftest import Denoiser, wan_model

MODES = ("token", "static", "static_bucket", "static_frame")
modes = pytest.mark.parametrize("activation", MODES)


class Plain(nn.Module):
    """Unknown to every family: the generic rule takes the two layers in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, timestep: object = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def first_output(model: nn.Module, value: float, dead: int = 0) -> None:
    """Make the first layer hand out one value whatever comes in, and zeros in its last `dead` channels."""
    model.layers[0].weight.data.zero_()
    model.layers[0].bias.data.fill_(value)
    model.layers[0].bias.data[64 - dead :] = 0.0


class TestDegenerateRanges:
    @modes
    @pytest.mark.parametrize("value", [0.0, 3.0, -1e-4, 2e4])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_a_constant_input(self, activation, value, bits):
        model = Plain()
        first_output(model, value)
        x = torch.randn(2, 5, 64)
        spec = QuantSpec(weight_bits=bits, activation=activation)
        scales = calibrate_model(model, lambda: model(x), spec)
        with torch.no_grad():
            expected = model(x)
            out = quantize_model(model, spec, scales)(x)
        assert bool(out.isfinite().all())
        assert float((out - expected).abs().max()) <= 0.01 * float(expected.abs().max())

    @modes
    def test_dead_channels(self, activation):
        model = Plain()
        model.layers[0].weight.data[32:] = 0.0
        model.layers[0].bias.data[32:] = 0.0
        x = torch.randn(2, 40, 64)
        spec = QuantSpec(activation=activation, rotate=True)
        scales = calibrate_model(model, lambda: model(x), spec)
        held = scales.layers["layers.1"]
        assert bool(held.input_scale.isfinite().all()) and not held.input_max[32:].any()
        with torch.no_grad():
            expected = model(x)
            out = quantize_model(model, spec, scales)(x)
        assert float((out - expected).square().sum() / expected.square().sum()) < 1e-3

    @modes
    def test_an_input_outside_the_calibrated_range_stays_finite(self, activation):
        model = Plain()
        first_output(model, 0.0)
        spec = QuantSpec(activation=activation)
        scales = calibrate_model(model, lambda: model(torch.zeros(2, 64)), spec)
        model.layers[0].bias.data.fill_(1e4)
        assert bool(quantize_model(model, spec, scales)(torch.zeros(2, 64)).isfinite().all())


def video_run(wan: Denoiser, model: nn.Module, frames: int, timesteps: tuple[float, ...]) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    latents = torch.randn(2, 4, frames, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 6, 32, generator=generator).to(dtype)

    @torch.no_grad()
    def run() -> Tensor:
        outputs = [
            model(hidden_states=latents, timestep=torch.full((2,), timestep), encoder_hidden_states=text).sample
            for timestep in timesteps
        ]
        return torch.stack(outputs).float()

    return run


class TestShortRuns:
    @modes
    @pytest.mark.parametrize("frames", [1, 3])
    def test_one_step(self, wan, activation, frames):
        """Distilled models sample in one step: one bucket, however many are allowed."""
        model = wan.copy()
        run = video_run(wan, model, frames, (999.0,))
        spec = QuantSpec(activation=activation, scale="smooth", temporal_quantizer="power")
        scales = calibrate_model(model, run, spec)
        assert all(len(layer.bucket_steps) == 1 for layer in scales.layers.values())
        expected = run()
        quantize_model(model, spec, scales)
        assert float((run() - expected).square().sum() / expected.square().sum()) < 1e-3

    def test_one_frame_is_one_scale(self, wan):
        model = wan.copy()
        spec = QuantSpec(activation="static_frame", shift=False, scale="none", temporal="none")
        scales = calibrate_model(model, video_run(wan, model, 1, (900.0, 100.0)), spec)
        quantize_model(model, spec, scales)
        assert not model._forward_pre_hooks
        assert model.blocks[0].attn1.to_q.plan.steps_by == "layer"

    def test_a_changing_number_of_frames_gives_one_scale_per_layer(self, wan):
        spec = QuantSpec(activation="static_frame", shift=False, scale="none", temporal="none")
        model = wan.copy()
        runs = [video_run(wan, model, frames, (500.0,)) for frames in (3, 2)]
        scales = calibrate_model(model, lambda: [run() for run in runs], spec)
        assert all(layer.frame_steps is None and layer.frame_order == "" for layer in scales.layers.values())

    def test_no_rows_at_all(self):
        model = Plain()
        spec = QuantSpec(activation="static")
        scales = calibrate_model(model, lambda: model(torch.zeros(0, 64)), spec)
        assert scales.layers == {}
        with pytest.raises(QVDError, match=r"nothing for layer layers\.1"):
            quantize_model(model, spec, scales)


class TestStatic:
    def test_one_bucket_is_the_static_model(self, wan):
        spec = QuantSpec(activation="static_bucket", buckets=1, scale="smooth", temporal_quantizer="power")
        models = []
        for each in (spec, replace(spec, activation="static")):
            models.append(quantize_model(wan.copy(), each, wan.calibrate(each)))
        one, two = (model.state_dict() for model in models)
        assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
        assert torch.equal(wan.sample(models[0]), wan.sample(models[1]))

    def test_buckets_and_frames_help_where_ranges_drift(self, wan):
        """Six bits, and a modulation that grows with the timestep as in trained models."""
        model = wan.copy()
        with torch.no_grad():
            model.condition_embedder.time_proj.weight.mul_(12.0)
        drifting = Denoiser(model, wan.forward)
        figures = {}
        for activation in ("static", "static_bucket"):
            spec = QuantSpec(8, 6, activation, shift=False, scale="none", range="minmax", temporal="none")
            scales = drifting.calibrate(spec)
            figures[activation] = drifting.sqnr_db(quantize_model(drifting.copy(), spec, scales))
        assert figures["static_bucket"] > figures["static"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(weight_bits=4, activation="static_bucket", scale="smooth", temporal_quantizer="power"),
        QuantSpec(activation="static_frame", portable=True, scale="smooth", temporal_quantizer="power"),
        QuantSpec(rotate=True, scale="none", temporal_quantizer="power"),
    ],
    ids=["W4-bucket", "portable-frame", "rotation"],
)
def test_sixteen_bit_models(wan, spec, dtype):
    model = wan_model(0).to(dtype)
    model.condition_embedder.time_embedder.float()  # as diffusers loads it
    run = video_run(wan, model, 3, (900.0, 500.0, 100.0))
    scales = calibrate_model(model, run, spec)
    assert all(layer.input_max.dtype == torch.float32 for layer in scales.layers.values())
    expected = run()
    quantize_model(model, spec, scales)
    out = run()
    assert model.proj_out.weight.dtype == dtype and model.blocks[0].attn1.to_q.weight_scale.dtype == torch.float32
    limit = 0.05 if spec.weight_bits == 4 else 0.002
    assert float((out - expected).square().sum() / expected.square().sum()) < limit
