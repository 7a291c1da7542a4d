"""Quantized layers: against full precision and an exact integer reference, through casts, copies and state dicts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core import QuantSpec
from qvd_core.convert import dequantize_layer, fill_layer, make_layer
from qvd_core.encode import encode_layer
from qvd_core.layers import QuantConv2d, QuantizedLayer, QuantLinear
from qvd_core.ops.semantics import code_limit
from qvd_core.plan import LayerPlan
from qvd_core.scales import LayerScales, Scales
from qvd_core.temporal_layer import TemporalLinear
from qvd_core.weights import quantize_weight

ALL_TENSORS = ("bias", "input_shift", "input_scale", "activation_scale")
convolutions = pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 2)},
        {"kernel_size": 2, "padding": "same", "dilation": 3},
    ],
)


def random_scales(module: nn.Module, x: Tensor, shift: float = 1.0) -> Scales:
    """Scales of the layer "layer" over the channels of x, with a random transform of that shift's size."""
    is_conv = isinstance(module, nn.Conv2d)
    rows = (x.movedim(1, -1) if is_conv else x).reshape(-1, module.weight.shape[1]).float()
    low, high = rows.amin(dim=0), rows.amax(dim=0)
    if is_conv:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    torch.manual_seed(5)
    transform = torch.randn(rows.shape[1]) * shift, torch.rand(rows.shape[1]) + 0.5
    layer = LayerScales(low, high, rows.mean(dim=0), *transform, torch.zeros(0))
    return Scales("Model", "0", QuantSpec(), layers={"layer": layer})


def quantize(module: nn.Module, spec: QuantSpec, scales: Scales | None, tensors: tuple[str, ...]) -> QuantizedLayer:
    """As `quantize_model` does for one layer."""
    plan = LayerPlan("conv2d" if isinstance(module, nn.Conv2d) else "linear", tensors)
    encoded = encode_layer("layer", plan, module.weight, module.bias, spec, scales)
    layer = make_layer(module, plan, spec, module.weight.dtype)
    fill_layer(layer, encoded)
    return layer


def calibrated(module: nn.Module, x: Tensor, activation: str = "static", shift: float = 1.0) -> QuantizedLayer:
    tensors = ALL_TENSORS if activation == "static" else ALL_TENSORS[:3]
    return quantize(module, QuantSpec(activation=activation), random_scales(module, x, shift), tensors)


@torch.no_grad()
def sqnr_db(out: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(expected.double().square().sum() / (out.double() - expected.double()).square().sum()))


def exact(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """METHOD 3.8 and nothing else: float64, with an integer sum; conv inputs zero-padded before the transform."""
    bits, is_conv = layer.spec.activation_bits, isinstance(layer, nn.Conv2d)
    if is_conv:
        x = F.pad(x, layer._reversed_padding_repeated_twice)
    view = (1, -1, 1, 1) if is_conv else (-1,)
    x = x.float()
    if layer.input_shift is not None:
        x = (x - layer.input_shift.view(view)) / layer.input_scale.view(view)
    if layer.activation_scale is not None:
        step = layer.activation_scale
    else:
        step = x.abs().amax(dim=(1, 2, 3) if is_conv else -1, keepdim=True) / code_limit(bits)
    codes = (x / step).round().clamp(-code_limit(bits), code_limit(bits)).double()
    weight = layer.weight.double()
    if is_conv:
        total = F.conv2d(codes, weight, stride=layer.stride, dilation=layer.dilation)
    else:
        total = codes @ weight.T
    out = total * step.double() * layer.weight_scale.double().view(view)
    return out if layer.bias is None else out + layer.bias.double().view(view)


class TestQuantLinear:
    @pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 5, 40), (2, 1, 3, 40), (0, 40)])
    @pytest.mark.parametrize("activation", ["token", "static"])
    def test_against_the_integer_reference(self, shape, activation):
        torch.manual_seed(0)
        module = nn.Linear(40, 24)
        layer = calibrated(module, torch.randn(50, 40) + 2, activation)
        x = torch.randn(shape) + 2
        out = layer(x)
        assert isinstance(layer, nn.Linear) and out.shape == module(x).shape and out.dtype == x.dtype
        torch.testing.assert_close(out.double(), exact(layer, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("bits", [(8, 8), (6, 6), (4, 8)])
    def test_against_full_precision(self, bias, bits):
        torch.manual_seed(0)
        module, x = nn.Linear(64, 32, bias=bias), torch.randn(100, 64)
        spec = QuantSpec(*bits)
        plain = quantize(module, spec, None, ("bias",) if bias else ())
        transformed = quantize(
            module, spec, random_scales(module, x, shift=0.1), ("bias", "input_shift", "input_scale")
        )
        floor = 6 * min(bits) - 9
        assert sqnr_db(plain(x), module(x)) > floor
        assert sqnr_db(transformed(x), module(x)) > floor

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_input_types(self, dtype):
        torch.manual_seed(0)
        x = torch.randn(7, 40).to(dtype)
        layer = calibrated(nn.Linear(40, 24), x)
        out = layer(x)
        assert out.dtype == dtype
        tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-6}[dtype]
        torch.testing.assert_close(out.double(), exact(layer, x), rtol=tolerance, atol=tolerance)

    def test_strides_do_not_matter(self):
        x = torch.randn(40, 9)
        layer = calibrated(nn.Linear(40, 24), x.T)
        assert torch.equal(layer(x.T), layer(x.T.contiguous()))

    def test_by_keyword(self):
        x = torch.randn(3, 40)
        layer = calibrated(nn.Linear(40, 24), x)
        assert torch.equal(layer(input=x), layer(x))

    def test_token_rows_are_independent(self):
        x = torch.randn(5, 40) * torch.logspace(-3, 3, 5)[:, None]
        layer = calibrated(nn.Linear(40, 24), x, "token")
        assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))

    @pytest.mark.parametrize("activation", ["token", "static"])
    def test_nan_reaches_the_output(self, activation):
        x = torch.randn(3, 40)
        layer = calibrated(nn.Linear(40, 24), x, activation)
        x[1, 7] = torch.nan
        assert layer(x)[1].isnan().all()

    def test_zero_input(self):
        layer = quantize(nn.Linear(40, 24), QuantSpec(), None, ("bias",))
        assert torch.equal(layer(torch.zeros(2, 40)), layer.bias.expand(2, 24))


class TestQuantConv2d:
    @convolutions
    @pytest.mark.parametrize("activation", ["token", "static"])
    def test_against_the_integer_reference(self, arguments, activation):
        torch.manual_seed(0)
        module = nn.Conv2d(5, 4, **arguments)
        x = torch.randn(3, 5, 8, 7) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1) + 3
        layer = calibrated(module, x, activation, shift=3.0)
        out = layer(x)
        assert isinstance(layer, nn.Conv2d) and out.shape == module(x).shape
        torch.testing.assert_close(out.double(), exact(layer, x), rtol=1e-5, atol=1e-4)

    @convolutions
    @pytest.mark.parametrize("activation", ["token", "static"])
    def test_the_border_is_exact_under_a_strong_shift(self, arguments, activation):
        """Values that 8 bits hold exactly, zero of the padding included: any other treatment of it is off by |W z|."""
        torch.manual_seed(0)
        module = nn.Conv2d(5, 4, **arguments)
        quantized = quantize_weight(module.weight.detach(), 8)
        module.weight = nn.Parameter(quantized.dequantize())
        shift = torch.tensor([50.0, -60.0, 40.0, 0.0, 63.0])
        x = torch.randint(-63, 64, (2, 5, 8, 7)).float() + shift.view(1, 5, 1, 1)
        x[:, 0, 2, 2] = 127 + shift[0]  # the steps are exactly one
        scales = random_scales(module, x)
        scales.layers["layer"].input_shift.copy_(shift)
        scales.layers["layer"].input_scale.fill_(1.0)
        tensors = ALL_TENSORS if activation == "static" else ALL_TENSORS[:3]
        layer = quantize(module, QuantSpec(activation=activation), scales, tensors)
        torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=2e-4)

    def test_images_are_independent(self):
        x = torch.randn(3, 5, 6, 6) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1, 1)
        layer = calibrated(nn.Conv2d(5, 4, 3, padding=1), x, "token")
        assert torch.equal(layer(x), torch.cat([layer(image[None]) for image in x]))

    def test_channels_last(self):
        x = torch.randn(2, 5, 6, 6)
        layer = calibrated(nn.Conv2d(5, 4, 3, padding=1), x)
        assert torch.equal(layer(x.to(memory_format=torch.channels_last)), layer(x))

    def test_by_keyword(self):
        x = torch.randn(2, 5, 6, 6)
        layer = calibrated(nn.Conv2d(5, 4, 3), x)
        assert torch.equal(layer(input=x), layer(x))

    @pytest.mark.parametrize("activation", ["token", "static"])
    def test_nan_reaches_the_output(self, activation):
        x = torch.randn(2, 5, 6, 6)
        layer = calibrated(nn.Conv2d(5, 4, 3), x, activation)
        x[1, 0, 3, 3] = torch.nan
        assert layer(x)[1].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_input_types(self, dtype):
        x = torch.randn(2, 5, 6, 6).to(dtype)
        layer = calibrated(nn.Conv2d(5, 4, 3, padding=1), x)
        out = layer(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact(layer, x), rtol=2**-8, atol=2**-7)


def three_layers() -> list[QuantizedLayer]:
    """One of every kind, with every tensor."""
    x = torch.randn(30, 6)
    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1)
    plan, spec = LayerPlan("temporal", ("bias", "codebook")), QuantSpec()
    temporal = TemporalLinear(linear, plan, spec, torch.float32)
    fill_layer(temporal, encode_layer("layer", plan, linear.weight, linear.bias, spec))
    codebook = {"levels": torch.linspace(-3, 3, 256), "boundaries": torch.linspace(-3, 3, 257)[1:-1]}
    fill_layer(temporal, codebook | {"offset": torch.zeros(6), "gain": torch.ones(6)})
    return [calibrated(linear, x), calibrated(conv, x[:, :, None, None]), temporal]


@pytest.fixture(params=range(3), ids=["linear", "conv2d", "temporal"])
def layer(request: pytest.FixtureRequest) -> QuantizedLayer:
    torch.manual_seed(0)
    return three_layers()[request.param]


def input_of(layer: QuantizedLayer, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn((2, 6, 5, 5) if isinstance(layer, QuantConv2d) else (3, 6)).to(dtype)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


class TestAsModules:
    @pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
    def test_casts_leave_codes_and_scales_alone(self, layer, cast):
        before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        getattr(layer, cast)()
        dtype = layer.bias.dtype
        assert dtype == {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[cast]
        for key, tensor in layer.state_dict().items():
            if key != "bias":
                assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key
        assert layer(input_of(layer, dtype)).dtype == dtype

    def test_to_with_dtype_and_back(self, layer):
        scale = layer.weight_scale.clone()
        layer.to(torch.bfloat16).to(device="cpu", dtype=torch.float32)
        assert layer.weight.dtype == torch.int8 and torch.equal(layer.weight_scale, scale)

    def test_dequantized_in_the_dtype_it_was_cast_to(self, layer):
        plain = dequantize_layer(layer.to(torch.bfloat16))
        assert plain.weight.dtype == plain.bias.dtype == torch.bfloat16
        assert plain(input_of(layer, torch.bfloat16)).dtype == torch.bfloat16

    def test_deepcopy(self, layer):
        x = input_of(layer)
        expected = layer(x)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), expected) and same_state(copied, layer)
        copied.weight.data.zero_()
        assert layer.weight.any()

    def test_pickle(self, layer):
        x = input_of(layer)
        expected = layer(x)
        loaded = pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own bytes
        assert torch.equal(loaded(x), expected) and same_state(loaded, layer)

    @pytest.mark.parametrize("assign", [True, False])
    def test_state_dict_round_trip(self, layer, assign):
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        x = input_of(layer)
        expected = layer(x)
        other = copy.deepcopy(layer)
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert not torch.equal(other(x), expected)
        other.load_state_dict(state, assign=assign)
        assert same_state(other, layer) and torch.equal(other(x), expected)

    def test_loads_into_an_empty_layer(self, layer):
        """A skeleton on meta, filled from a checkpoint: the loader's path."""
        empty = copy.deepcopy(layer).to("meta")
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert same_state(empty, layer) and torch.equal(empty(input_of(layer)), layer(input_of(layer)))

    def test_to_empty_keeps_types(self, layer):
        empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        assert {key: tensor.dtype for key, tensor in empty.state_dict().items()} == {
            key: tensor.dtype for key, tensor in layer.state_dict().items()
        }

    def test_missing_and_unexpected_keys_are_told(self, layer):
        state = layer.state_dict()
        state["wrong"] = state.pop("weight_scale")
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*weight_scale.*Unexpected key.*wrong"):
            copy.deepcopy(layer).load_state_dict(state)

    def test_parameters_are_frozen(self, layer):
        assert all(not parameter.requires_grad for parameter in layer.parameters())
        assert layer.weight.dtype == torch.int8 and isinstance(layer.weight, nn.Parameter)

    def test_repr_says_what_it_is(self, layer):
        assert "W8" in repr(layer) and "A8" in repr(layer) and "\n" not in repr(layer)


class TestMake:
    @pytest.mark.parametrize("training", [True, False])
    def test_empty_layers_are_on_meta(self, training):
        source = nn.Linear(6, 4, bias=False).train(training)
        layer = make_layer(source, LayerPlan("linear", ("bias",)), QuantSpec(), torch.bfloat16)
        assert isinstance(layer, QuantLinear) and layer.training is training
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        assert sorted(layer.state_dict()) == ["bias", "weight", "weight_scale"]
        assert layer.bias.dtype == torch.bfloat16 and layer.weight_scale.shape == (4, 1)

    def test_dequantize_undoes_the_transform(self):
        torch.manual_seed(0)
        for module, shape in ((nn.Linear(6, 4), (9, 6)), (nn.Conv2d(6, 4, 3, stride=2, dilation=2), (2, 6, 9, 9))):
            x = torch.randn(shape) + 5
            layer = calibrated(module, x, shift=5.0)
            plain = dequantize_layer(layer)
            assert type(plain) is type(module)
            assert sqnr_db(plain(x), module(x)) > 40
            assert sqnr_db(plain.weight, module.weight) > 35
