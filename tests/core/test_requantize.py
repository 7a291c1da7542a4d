"""Another float function for a quantized layer: right, in place, exact to undo, and refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qvd_core import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_core.requantize import float_layer, requantize, restore, skeleton
from tests.core.test_gradients import quantized

LAYERS = {
    "linear": lambda: (nn.Linear(32, 24), torch.randn(200, 32) + 1),
    "conv2d": lambda: (nn.Conv2d(8, 6, 3, padding=1, stride=2), torch.randn(3, 8, 9, 8) + 1),
    "conv3d": lambda: (nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)), torch.randn(2, 8, 4, 5, 5) + 1),
}


def case(kind: str, **choices: object) -> tuple[QuantizedLayer, Tensor, Tensor]:
    """A quantized layer, an input, and what to add to the weight."""
    torch.manual_seed(0)
    module, x = LAYERS[kind]()
    return quantized(module, rounding="nearest", **choices), x, 0.3 * torch.randn_like(module.weight)


def sqnr_db(out: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (out - expected).square().sum()))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("choices", "enough"),
    [({}, 35.0), ({"transformed": False}, 35.0), ({"rotation": 8}, 35.0), ({"weight_bits": 4}, 15.0)],
)
def test_the_sum_of_two_functions(kind, choices, enough):
    """The change acts on the original input, whatever shift, scale and rotation the layer has."""
    layer, x, delta = case(kind, **choices)
    changed = float_layer(layer)
    changed.weight.add_(delta)
    changed.bias.sub_(2.0)
    expected = changed(x)
    requantize(layer, changed)
    assert sqnr_db(layer(x), expected) > enough
    if layer.weight_bits == 8:
        assert layer(x).mean() == pytest.approx(expected.mean().item(), abs=0.05)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_undone_bit_for_bit_in_the_same_tensors(kind, weight_bits):
    layer, _, delta = case(kind, weight_bits=weight_bits)
    before = {name: (tensor, tensor.clone()) for name, tensor in layer.state_dict(keep_vars=True).items()}
    changed = float_layer(layer)
    changed.weight.add_(delta)
    replaced = requantize(layer, changed)
    assert not torch.equal(layer.weight, before["weight"][1])
    restore(layer, replaced)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_skeleton(kind, weight_bits):
    layer, x, _ = case(kind, weight_bits=weight_bits)
    layer.to(torch.bfloat16)
    module, twin = LAYERS[kind]()[0], skeleton(layer)
    assert type(twin) is type(module) and twin.weight.shape == module.weight.shape
    assert twin.weight.dtype == twin.bias.dtype == torch.bfloat16 and twin.weight.device == layer.weight.device
    assert twin.weight.untyped_storage().nbytes() == 2


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("weight", torch.nan, "holds NaN"), ("bias", torch.inf, "holds NaN"), ("bias", 1e6, "range of float16")],
)
def test_refused_before_anything_changes(name, value, reason):
    layer, _, _ = case("linear")
    layer.to(torch.float16)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    changed = float_layer(layer)
    getattr(changed, name).view(-1)[0] = value
    with pytest.raises(QVDError, match=reason):
        requantize(layer, changed)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_a_weight_that_is_not_at_hand():
    layer, _, _ = case("linear")
    with pytest.raises(QVDError, match="on the meta device"):
        float_layer(layer.to("meta"))
