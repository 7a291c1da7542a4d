"""Quantized layers whose scales change while sampling, with packed 4-bit weights, or with a rotation of channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core import QuantSpec
from qvd_core.convert import dequantize_layer, fill_layer, make_layer
from qvd_core.encode import encode_layer
from qvd_core.layers import QuantizedLayer
from qvd_core.ops.semantics import code_limit
from qvd_core.plan import LayerPlan
from qvd_core.scales import LayerScales, Scales
from tests.core.video_clock import clock, set_clock

BUCKETS, BOUNDARIES = torch.tensor([0.02, 0.06, 0.03]), torch.tensor([300.0, 700.0])
FRAMES = torch.tensor([0.02, 0.06, 0.03])


def calibrated(module: nn.Module, seed: int = 5, rotation: int = 0, **steps: Tensor) -> LayerScales:
    """Scales with a random shift and scale; `steps` as in `LayerScales`."""
    generator = torch.Generator().manual_seed(seed)
    channels = module.weight.shape[1]
    shift, scale = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    edge, mean = torch.full((channels,), 4.0), torch.full((channels,), 0.5)
    return LayerScales(-edge, edge, mean, shift, scale, torch.zeros(0), rotation=rotation, **steps)


def quantize(module: nn.Module, plan: LayerPlan, spec: QuantSpec, layer: LayerScales | None) -> QuantizedLayer:
    """As `quantize_model` does for one layer."""
    scales = None if layer is None else Scales("Model", "0", QuantSpec(4), layers={"layer": layer})
    scales = None if scales is None else replace(scales, spec=spec)
    made = make_layer(module, plan, spec, module.weight.dtype)
    fill_layer(made, encode_layer("layer", plan, module.weight.detach(), module.bias, spec, scales))
    return made


def kind_of(module: nn.Module) -> str:
    return "conv2d" if isinstance(module, nn.Conv2d) else "linear"


def stepped(module: nn.Module, steps_by: str) -> QuantizedLayer:
    """A layer with three static steps, and a clock of its own."""
    tensors = ("bias", "input_shift", "input_scale", "activation_scale")
    plan = LayerPlan(kind_of(module), tensors, 3, steps_by)
    steps = {"static_step": torch.tensor([0.06])}
    if steps_by == "timestep":
        steps |= {"bucket_steps": BUCKETS, "bucket_boundaries": BOUNDARIES}
    else:
        steps |= {"frame_steps": FRAMES}
    activation = "static_bucket" if steps_by == "timestep" else "static_frame"
    layer = quantize(module, plan, QuantSpec(activation=activation), calibrated(module, **steps))
    layer.clock = clock()
    return layer


def exact(layer: QuantizedLayer, x: Tensor, step: Tensor) -> Tensor:
    """METHOD 3.8 in float64 with an explicit step, broadcastable over rows or images."""
    is_conv = isinstance(layer, nn.Conv2d)
    view = (1, -1, 1, 1) if is_conv else (-1,)
    x = F.pad(x, layer._reversed_padding_repeated_twice) if is_conv else x
    x = (x - layer.input_shift.view(view)) / layer.input_scale.view(view)
    codes = (x / step).round().clamp(-127, 127).double()
    weight = layer.weight.double()
    total = F.conv2d(codes, weight, stride=layer.stride) if is_conv else codes @ weight.T
    out = total * step.double() * layer.weight_scale.double().view(view)
    return out + layer.bias.double().view(view)


def inputs(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer, and an input of 2 videos of 3 frames: tokens [2, 3 * 4, 16] or images [6, 5, 7, 6]."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(16, 8), torch.randn(2, 12, 16) * 2
    return nn.Conv2d(5, 4, 3, padding=1, stride=2), torch.randn(6, 5, 7, 6) * 2


class TestSteps:
    @pytest.mark.parametrize("kind", ["linear", "conv2d"])
    def test_bucket_of_the_timestep(self, kind):
        module, x = inputs(kind)
        layer = stepped(module, "timestep")
        outputs = []
        for timestep, step in ((0.0, BUCKETS[0]), (299.0, BUCKETS[0]), (500.0, BUCKETS[1]), (999.0, BUCKETS[2])):
            set_clock(layer.clock, timestep)
            outputs.append(layer(x))
            torch.testing.assert_close(outputs[-1].double(), exact(layer, x, step), rtol=1e-5, atol=1e-4)
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
        set_clock(layer.clock, None)
        assert torch.equal(layer(x), outputs[2])  # no timestep: the widest step

    @pytest.mark.parametrize(("kind", "order"), [("linear", "major"), ("linear", "minor"), ("conv2d", "major")])
    def test_step_of_the_frame(self, kind, order):
        module, x = inputs(kind)
        layer = stepped(module, order)
        set_clock(layer.clock, 500.0, 2, 3)
        if kind == "conv2d":
            step = FRAMES.repeat(2).view(6, 1, 1, 1)
        else:
            step = (FRAMES.repeat_interleave(4) if order == "major" else FRAMES.repeat(4)).view(1, 12, 1)
        torch.testing.assert_close(layer(x).double(), exact(layer, x, step), rtol=1e-5, atol=1e-4)
        set_clock(layer.clock, 500.0, 2, 2)
        torch.testing.assert_close(layer(x).double(), exact(layer, x, FRAMES.amax()), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("steps_by", ["timestep", "major"])
    def test_state_dict_and_casts(self, steps_by):
        layer = stepped(inputs("linear")[0], steps_by)
        state = layer.state_dict()
        assert state["activation_scale"].shape == (3,)
        assert ("bucket_boundaries" in state) == (steps_by == "timestep")
        layer.to(torch.bfloat16)
        for name in ("activation_scale", *(["bucket_boundaries"] if steps_by == "timestep" else [])):
            assert layer.state_dict()[name].dtype == torch.float32 and torch.equal(
                layer.state_dict()[name], state[name]
            )
        assert f"static by {'timestep' if steps_by == 'timestep' else 'frame'}" in repr(layer)

    @pytest.mark.parametrize("steps_by", ["timestep", "major"])
    def test_nan_reaches_the_output(self, steps_by):
        module, x = inputs("linear")
        layer = stepped(module, steps_by)
        set_clock(layer.clock, 500.0, 2, 3)
        x[1, 2, 3] = torch.nan
        assert layer(x)[1, 2].isnan().all()

    @pytest.mark.parametrize("steps_by", ["timestep", "major"])
    def test_compiles_whole_and_once_for_all_timesteps(self, steps_by):
        """A timestep read on the host would break the graph here, and stall a GPU at every layer and step."""
        torch._dynamo.reset()
        module, x = inputs("linear")
        layer = stepped(module, steps_by)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for timestep in (100.0, 500.0, 999.0):
                set_clock(layer.clock, timestep, 2, 3)
                assert torch.equal(compiled(x), layer(x))


class TestFourBits:
    @pytest.mark.parametrize(
        "module",
        [nn.Linear(16, 8), nn.Linear(15, 8), nn.Linear(1, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 3, (2, 1), bias=False)],
        ids=str,
    )
    @pytest.mark.parametrize("activation_bits", [8, 4])
    def test_packed_equals_unpacked(self, module, activation_bits):
        """Two codes per byte, and the output of the same int8 codes bit for bit."""
        torch.manual_seed(0)
        plan = LayerPlan(kind_of(module), () if module.bias is None else ("bias",))
        packed = quantize(module, plan, QuantSpec(4, activation_bits), None)
        elements = module.weight[0].numel()
        assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (len(module.weight), -(-elements // 2))
        unpacked = make_layer(module, plan, QuantSpec(8, activation_bits), torch.float32)
        state = {**packed.state_dict(), "weight": packed.weight_codes()}
        fill_layer(unpacked, state)
        assert unpacked.weight.dtype == torch.int8 and int(unpacked.weight.abs().max()) <= 7
        x = torch.randn(2, module.weight.shape[1], *((6, 6) if isinstance(module, nn.Conv2d) else ()))
        assert torch.equal(packed(x), unpacked(x))
        assert torch.equal(packed.dequantized_weight(), unpacked.dequantized_weight())

    def test_casts_leave_the_codes_alone(self):
        layer = quantize(nn.Linear(15, 8), LayerPlan("linear", ("bias",)), QuantSpec(4), None)
        codes = layer.weight.clone()
        layer.to(torch.bfloat16).half()
        assert layer.weight.dtype == torch.uint8 and torch.equal(layer.weight, codes)
        assert layer(torch.randn(3, 15).half()).dtype == torch.float16

    def test_dequantized(self):
        torch.manual_seed(0)
        module = nn.Linear(33, 16)
        layer = quantize(module, LayerPlan("linear", ("bias",)), QuantSpec(4), None)
        plain = dequantize_layer(layer)
        assert torch.equal(plain.weight, layer.dequantized_weight()) and torch.equal(plain.bias, module.bias)
        error = (plain.weight - module.weight.detach()).square().sum() / module.weight.detach().square().sum()
        assert float(error) < 0.02

    def test_temporal_weights_stay_int8(self):
        layer = make_layer(nn.Linear(6, 4), LayerPlan("temporal", ("bias",)), QuantSpec(4), torch.float32)
        assert layer.weight.dtype == torch.int8 and layer.weight.shape == (4, 6)


def block_hadamard(channels: int, block: int) -> Tensor:
    """The rotation as an explicit matrix, float64 [K, K]."""
    one = torch.ones(1, 1, dtype=torch.float64)
    while len(one) < block:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    return torch.block_diag(*[one / block**0.5] * (channels // block))


class TestRotation:
    @pytest.mark.parametrize("activation", ["token", "static"])
    @pytest.mark.parametrize(("channels", "block"), [(32, 32), (48, 16)])
    def test_linear_equals_explicit_matrices(self, channels, block, activation):
        torch.manual_seed(0)
        module, x = nn.Linear(channels, 8), torch.randn(20, channels) * 2
        tensors = ("bias", "input_shift", "input_scale", *(["activation_scale"] if activation == "static" else []))
        plan = LayerPlan("linear", tensors, rotation=block)
        held = calibrated(module, rotation=block, static_step=torch.tensor([0.07]))
        layer = quantize(module, plan, QuantSpec(activation=activation, rotate=True), held)
        matrix = block_hadamard(channels, block)
        rotated = ((x.double() - held.input_shift.double()) / held.input_scale.double()) @ matrix
        step = 0.07 if activation == "static" else rotated.abs().amax(dim=1, keepdim=True) / 127
        rounded = (rotated / step).round().clamp(-127, 127) * step
        weight = layer.dequantized_weight().double()
        ideal = (module.weight.double() * held.input_scale.double()) @ matrix
        half_step = layer.weight_scale.double() / 2
        assert bool(((weight - ideal).abs() <= half_step * 1.001).all())
        expected = rounded @ weight.T + layer.bias.double()
        # A value at an exact half may round either way in float32.
        worst = float(layer.weight_scale.max()) * code_limit(8) * float(torch.as_tensor(step).max())
        assert float((layer(x).double() - expected).abs().max()) < worst * 1.01
        assert float((layer(x).double() - expected).abs().mean()) < worst * 0.02
        torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0.2)

    def test_convolution_equals_explicit_matrices(self):
        """Rotated pixel by pixel, the zeros of the padding shifted first."""
        torch.manual_seed(0)
        module, x = nn.Conv2d(16, 4, 3, padding=1), torch.randn(2, 16, 5, 5)
        held = calibrated(module, rotation=16)
        layer = quantize(
            module,
            LayerPlan("conv2d", ("bias", "input_shift", "input_scale"), rotation=16),
            QuantSpec(rotate=True),
            held,
        )
        padded = F.pad(x, [1] * 4).double().permute(0, 2, 3, 1)
        rotated = ((padded - held.input_shift.double()) / held.input_scale.double()) @ block_hadamard(16, 16)
        step = rotated.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        rounded = ((rotated / step).round() * step).permute(0, 3, 1, 2)
        expected = F.conv2d(rounded, layer.dequantized_weight().double(), layer.bias.double())
        difference = (layer(x).double() - expected).abs()
        assert float(difference.mean()) < 1e-3 and float(difference.max()) < 0.02
        torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0.2)

    def test_dequantizing_turns_back(self):
        torch.manual_seed(0)
        for module in (nn.Linear(32, 8), nn.Conv2d(32, 8, 3, padding=1)):
            plan = LayerPlan(kind_of(module), ("bias", "input_shift", "input_scale"), rotation=32)
            layer = quantize(module, plan, QuantSpec(rotate=True), calibrated(module, rotation=32))
            plain = dequantize_layer(layer)
            torch.testing.assert_close(plain.weight, module.weight, rtol=0, atol=0.01)
            assert "rotation" in repr(layer)

    def test_rotation_saves_an_outlier(self):
        """One channel 50 times the others: at 4 bits the others vanish, unless they are rotated."""
        torch.manual_seed(0)
        module, x = nn.Linear(32, 64, bias=False), torch.randn(100, 32)
        x[:, 3] *= 50
        module.weight.data[:, 3] = 0
        held = replace(calibrated(module), input_shift=torch.zeros(32), input_scale=torch.ones(32), rotation=32)
        errors = []
        for rotation in (0, 32):
            spec = QuantSpec(8, 4, bias_correction=False)
            layer = quantize(module, LayerPlan("linear", (), rotation=rotation), spec, held)
            errors.append(float((layer(x) - module(x)).detach().square().mean()))
        assert errors[1] < errors[0] / 2
