"""Gradients of the int8 layers: the forward pass of inference, the backward pass of the float layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qvd_core import QuantSpec, dequantize_model, quantize_model, shared_input
from qvd_core.convert import dequantize_layer, fill_layer, make_layer
from qvd_core.encode import encode_layer
from qvd_core.layers import QuantizedLayer
from qvd_core.ops import WEIGHT_ONLY, available_backends, dispatch
from qvd_core.plan import LayerPlan
from qvd_core.scales import LayerScales, Scales
from tests.core.conftest import Denoiser
from tests.core.temporal_cases import layer_features, temporal_layer
from tests.core.test_layer_variants import stepped

CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 2)},
    {"kernel_size": 2, "padding": "same", "dilation": 3},
]


def quantized(module: nn.Module, rotation: int = 0, transformed: bool = True, **choices: object) -> QuantizedLayer:
    """As `quantize_model` does for one layer, with a random shift and scale. choices: of the QuantSpec."""
    spec = QuantSpec(**choices)
    kind = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}[type(module)]
    steps = ("activation_scale",) if spec.activation == "static" else ()
    tensors = ("bias", "input_shift", "input_scale", *steps) if transformed else ("bias",)
    tensors = tensors if module.bias is not None or transformed else ()
    generator = torch.Generator().manual_seed(5)
    channels = module.weight.shape[1]
    shift, scale = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    edge = torch.full((channels,), 4.0)
    calibrated = LayerScales(-edge, edge, torch.full((channels,), 0.5), shift, scale, torch.zeros(0), rotation=rotation)
    scales = Scales("Model", "0", spec, layers={"layer": calibrated}) if transformed else None
    plan = LayerPlan(kind, tensors, rotation=rotation if transformed else 0)
    layer = make_layer(module, plan, spec, module.weight.dtype)
    bias = None if module.bias is None else module.bias.detach()
    fill_layer(layer, encode_layer("layer", plan, module.weight.detach(), bias, spec, scales))
    return layer


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    out.backward(dy)
    return out.detach(), x.grad


def expected_gradient(layer: QuantizedLayer, x: Tensor, dy: Tensor) -> Tensor:
    """The straight-through rule in float64: the gradient of the float layer that the int8 one stands for."""
    layer = copy.deepcopy(layer)
    layer.compute_dtype = torch.float32
    return gradients(dequantize_layer(layer).double(), x.double(), dy.double())[1]


def cosine(first: Tensor, second: Tensor) -> float:
    return float(F.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


def a_linear(seed: int = 0, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(32, 24, bias=bias), torch.randn(2, 5, 32) + 0.5, torch.randn(2, 5, 24)


def check(layer: QuantizedLayer, x: Tensor, dy: Tensor) -> None:
    """Bit for bit the output of inference, and the gradient of the rule up to float32's rounding."""
    out, dx = gradients(layer, x, dy)
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    torch.testing.assert_close(dx.double(), expected_gradient(layer, x, dy), rtol=1e-4, atol=1e-5)


class TestRule:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("weight_bits", [8, 4])
    @pytest.mark.parametrize(
        "choices",
        [
            {"transformed": False},
            {"activation": "token"},
            {"activation": "static"},
            {"rotation": 8},
            {"backend": WEIGHT_ONLY},
        ],
    )
    def test_linear(self, choices, weight_bits, bias):
        module, x, dy = a_linear(bias=bias)
        check(quantized(module, weight_bits=weight_bits, rounding="nearest", **choices), x, dy)

    @pytest.mark.parametrize("arguments", CONVOLUTIONS)
    @pytest.mark.parametrize("choices", [{"activation": "static"}, {"weight_bits": 4, "backend": WEIGHT_ONLY}])
    def test_convolution(self, arguments, choices):
        torch.manual_seed(0)
        module, x = nn.Conv2d(5, 4, **arguments), torch.randn(2, 5, 7, 6) + 0.5
        check(quantized(module, rounding="nearest", **choices), x, torch.randn_like(module(x)))

    @pytest.mark.parametrize("choices", [{}, {"rotation": 2}, {"transformed": False}])
    def test_convolution_of_videos(self, choices):
        torch.manual_seed(0)
        module, x = nn.Conv3d(4, 3, (3, 1, 2), padding=(1, 0, 1), stride=(1, 2, 1)), torch.randn(2, 4, 3, 5, 4)
        check(quantized(module, **choices), x, torch.randn_like(module(x)))

    @pytest.mark.parametrize("steps_by", ["timestep", "minor"])
    def test_steps_that_change_while_sampling(self, steps_by):
        torch.manual_seed(0)
        check(stepped(nn.Linear(16, 8), steps_by), torch.randn(2, 12, 16) * 2, torch.randn(2, 12, 8))

    def test_clipped_values_have_the_gradient_of_the_others(self):
        module, x, dy = a_linear()
        layer = quantized(module, activation="static")
        layer.activation_scale.fill_(1e-3)
        check(layer, x, dy)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("backend", ["auto", WEIGHT_ONLY])
    def test_16_bits(self, dtype, backend):
        module, x, dy = a_linear()
        layer = quantized(module, backend=backend).to(dtype)
        out, dx = gradients(layer, x.to(dtype), dy.to(dtype))
        assert out.dtype == dx.dtype == dtype
        assert cosine(dx, expected_gradient(layer, x, dy)) > 0.999

    @pytest.mark.parametrize("backend", [*available_backends("cpu"), WEIGHT_ONLY])
    def test_all_backends_agree(self, backend):
        module, x, dy = a_linear()
        _, expected = gradients(quantized(module, backend="reference"), x, dy)
        layer = quantized(module, backend=backend)
        out, dx = gradients(layer, x, dy)
        with torch.no_grad():
            assert torch.equal(out, layer(x))
        assert torch.equal(dx, expected)

    def test_close_to_the_gradient_of_the_full_precision_layer(self):
        module, x, dy = a_linear()
        assert cosine(gradients(quantized(module), x, dy)[1], gradients(module, x, dy)[1]) > 0.999


class TestBias:
    @pytest.mark.parametrize("backend", available_backends("cpu"))
    @pytest.mark.parametrize("input_too", [True, False])
    @pytest.mark.parametrize("kind", ["linear", "conv", "temporal"])
    def test_its_gradient(self, backend, input_too, kind):
        torch.manual_seed(0)
        if kind == "temporal":
            layer, x = temporal_layer("table"), layer_features(3)
        else:
            module = nn.Linear(5, 4) if kind == "linear" else nn.Conv2d(5, 4, 1)
            layer, x = quantized(module, backend=backend), torch.randn(2, 5, 7, 5)
        layer.bias.requires_grad_()
        x.requires_grad_(input_too)
        out = layer(x)
        dy = torch.randn_like(out)
        out.backward(dy)
        dims = (0, 2, 3) if kind == "conv" else tuple(range(out.dim() - 1))
        torch.testing.assert_close(layer.bias.grad, dy.sum(dims))
        assert (x.grad is not None) == input_too and layer.weight.grad is None

    def test_nothing_asked_for_is_nothing_given(self):
        module, x, _ = a_linear()
        assert not quantized(module)(x).requires_grad


class TestAutograd:
    def test_keeps_the_int8_weight_and_no_float_one(self):
        module, x, _ = a_linear()
        layer = quantized(module)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
            layer(x.requires_grad_())
        floats = sum(tensor.numel() for tensor in saved if tensor.is_floating_point())
        assert any(tensor is layer.weight for tensor in saved)
        assert floats == layer.weight_scale.numel() + layer.input_scale.numel()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_under_checkpointing(self, reentrant):
        torch.manual_seed(0)
        module = nn.Sequential(quantized(nn.Linear(32, 16)), nn.GELU(), quantized(nn.Linear(16, 32)))
        x, dy = torch.randn(4, 32), torch.randn(4, 32)
        out, dx = gradients(module, x, dy)
        again, d_again = gradients(lambda y: checkpoint(module, y, use_reentrant=reentrant), x, dy)
        assert torch.equal(out, again) and torch.equal(dx, d_again)

    @pytest.mark.parametrize("backend", ["auto", "emulated", WEIGHT_ONLY])
    def test_under_autocast(self, backend):
        module, x, dy = a_linear()
        layer = quantized(module, backend=backend)
        expected = gradients(layer, x, dy)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, gradients(layer, x, dy), expected))

    @pytest.mark.parametrize("kind", ["linear", "conv", "temporal"])
    def test_compiles_in_one_graph(self, kind):
        torch.manual_seed(0)
        if kind == "temporal":
            layer, x = temporal_layer("table"), layer_features(3)
        elif kind == "conv":
            layer, x = quantized(nn.Conv2d(5, 4, 3, padding=1, stride=2), activation="static"), torch.randn(2, 5, 6, 7)
        else:
            layer, x = quantized(nn.Linear(32, 24), rotation=8), torch.randn(2, 5, 32)
        layer.bias.requires_grad_()
        model = nn.Sequential(layer, nn.GELU())
        dy = torch.randn_like(model(x))
        expected = gradients(model, x, dy)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for got, right in zip(gradients(compiled, x, dy), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)

    def test_second_derivatives_are_those_of_the_straight_through_product(self):
        module, x, _ = a_linear()
        layer = quantized(module)
        x = x[0].double().float().requires_grad_()
        loss = layer(x).square().sum() / 2
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        direction = torch.randn_like(dx)
        (curvature,) = torch.autograd.grad(dx, x, direction)
        layer.compute_dtype = torch.float32
        weight = dequantize_layer(layer).weight
        torch.testing.assert_close(curvature, direction @ weight.T @ weight, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["linear", "temporal"])
    def test_functional_transform(self, kind, monkeypatch):
        monkeypatch.setattr(shared_input, "SMALL_INPUT", 0)
        layer, x = (
            (quantized(a_linear()[0]), torch.randn(3, 32))
            if kind == "linear"
            else (temporal_layer("table"), layer_features(3))
        )
        if kind == "linear":
            layer.shared_input = shared_input.SharedInput(2)
        expected = gradients(layer, x, torch.ones_like(layer(x)))[1]
        torch.testing.assert_close(torch.func.grad(lambda value: layer(value).sum())(x), expected)

    def test_the_output_may_be_changed_in_place(self):
        module, x, dy = a_linear()
        layer = quantized(module)
        assert torch.equal(gradients(lambda y: layer(y).mul_(2), x, dy)[1], gradients(layer, x, 2 * dy)[1])

    def test_a_weight_changed_before_the_backward_pass_is_an_error(self):
        module, x, _ = a_linear()
        layer = quantized(module)
        out = layer(x.requires_grad_())
        with torch.no_grad():
            layer.weight.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


class TestTemporal:
    @pytest.mark.parametrize("mode", ["table", "online"])
    @pytest.mark.parametrize("fitted", [True, False])
    def test_rule(self, mode, fitted):
        layer, x = temporal_layer(mode, fitted=fitted), layer_features(3)[[0, 1, 0, 2]]
        dy = torch.randn(4, layer.out_features, generator=torch.Generator().manual_seed(0))
        check(layer, x, dy)

    def test_training_leaves_nothing_in_the_table(self):
        layer, x = temporal_layer("table"), layer_features(3)
        layer(x.requires_grad_())
        assert len(layer.table) == 0

    def test_a_trained_bias_is_seen_by_the_next_sampling(self):
        layer, x = temporal_layer("table"), layer_features(3)
        with torch.no_grad():
            before = layer(x)
        assert len(layer.table) > 0
        layer.bias.requires_grad_()
        layer(x).sum().backward()
        with torch.no_grad():
            layer.bias.sub_(layer.bias.grad)
            layer.bias.requires_grad_(False)
            torch.testing.assert_close(layer(x), before - len(x))


class TestModel:
    def test_shared_input_is_quantized_once_and_gathers_all_gradients(self, wan, monkeypatch):
        attention = quantize_model(wan.copy()).blocks[0].attn1
        monkeypatch.setenv("QVD_BACKEND", "reference")
        monkeypatch.setattr(shared_input, "SMALL_INPUT", 0)
        calls: list[Tensor] = []
        reference = dispatch.backend("reference")
        original = reference.quantize_rows
        monkeypatch.setattr(reference, "quantize_rows", lambda x, *rest: calls.append(x) or original(x, *rest))
        layers = (attention.to_q, attention.to_k, attention.to_v)
        x = torch.randn(2, 5, attention.to_q.in_features)
        dy = torch.randn(2, 5, attention.to_q.out_features)
        _, dx = gradients(lambda y: sum(layer(y) for layer in layers), x, dy)
        assert len(calls) == 1
        torch.testing.assert_close(dx, sum(gradients(layer, x, dy)[1] for layer in layers))

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_gradient_of_a_whole_model(self, wan, checkpointing):
        check_model(wan, checkpointing)

    def test_gradient_of_a_whole_unet(self, unet):
        check_model(unet, checkpointing=True)


def check_model(denoiser: Denoiser, checkpointing: bool) -> None:
    """Of the bias before all quantized layers: close to the gradient in the float model of the same weights."""
    model = quantize_model(denoiser.copy()).requires_grad_(False).train()
    plain = dequantize_model(copy.deepcopy(model))
    if checkpointing:
        model.enable_gradient_checkpointing()
    found = []
    for each in (model, plain):
        bias = (each.patch_embedding if hasattr(each, "patch_embedding") else each.conv_in).bias.requires_grad_()
        denoiser.forward(each, 500.0).square().sum().backward()
        found.append(bias.grad)
    assert cosine(*found) > 0.99
