"""Copies and pickles of quantized models: they compute the same, and are independent of the original."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from qvd_core.layers import QuantizedLayer, QuantLinear
from qvd_diffusers import QVDConfig
from tests.diffusers.adapters import BUCKETS, STATIC, same, tensors, unet, wan

pytestmark = pytest.mark.filterwarnings("ignore:Merging an adapter")


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "torch.save": through_torch_save,
}


@pytest.fixture(params=list(WAYS))
def duplicate(request):
    return WAYS[request.param]


def groups(model: nn.Module) -> dict[int, list[str]]:
    """Names of the layers that share an input, by the group's identity."""
    found: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and layer.shared_input is not None:
            found.setdefault(id(layer.shared_input), []).append(name)
    return found


def check(model: Any, duplicate: Any, denoiser: Any) -> Any:
    """A duplicate that computes the same and shares nothing with the model."""
    twin = duplicate(model)
    for timestep in (900.0, 100.0):
        assert torch.equal(denoiser.run(twin, timestep), denoiser.run(model, timestep))
    assert sorted(groups(twin).values()) == sorted(groups(model).values())
    assert not groups(twin).keys() & groups(model).keys()
    expected = denoiser.run(model)
    with torch.no_grad():
        for layer in twin.modules():
            if isinstance(layer, QuantizedLayer):
                layer.weight.zero_()
                layer.weight_scale.zero_()
    assert torch.equal(denoiser.run(model), expected) and not torch.equal(denoiser.run(twin), expected)
    return twin


def test_quantized(duplicate):
    check(wan().quantized(STATIC), duplicate, wan())


def test_convolutions(duplicate):
    check(unet().quantized(), duplicate, unet())


def test_loaded_by_diffusers(duplicate, wan_folder):
    config = QVDConfig()
    model = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", quantization_config=config)
    twin = check(model, duplicate, wan())
    assert twin.hf_quantizer is not model.hf_quantizer and twin.config == model.config


def test_saved_by_diffusers(duplicate, wan_folder, tmp_path):
    config = QVDConfig()
    model = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", quantization_config=config)
    model.save_pretrained(tmp_path / "first")
    duplicate(WanTransformer3DModel.from_pretrained(tmp_path / "first")).save_pretrained(tmp_path / "second")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "second")
    assert same(again.state_dict(), model.state_dict())


def test_with_a_clock(duplicate):
    model = wan().quantized(BUCKETS)
    twin = check(model, duplicate, wan())
    clocks = {id(layer.clock) for layer in twin.modules() if isinstance(layer, QuantizedLayer) and layer.clock}
    old = {id(layer.clock) for layer in model.modules() if isinstance(layer, QuantizedLayer) and layer.clock}
    assert len(clocks) == len(old) == 1 and clocks != old
    wan().run(model, 900.0)
    wan().run(twin, 100.0)
    timesteps = {
        float(layer.clock.timestep)
        for each in (model, twin)
        for layer in each.modules()
        if isinstance(layer, QuantizedLayer) and layer.clock
    }
    assert timesteps == {900.0, 100.0}
    clock = next(layer.clock for layer in twin.modules() if isinstance(layer, QuantizedLayer) and layer.clock)
    clock.detach()
    assert len(twin._forward_pre_hooks) == 0 and len(model._forward_pre_hooks) == 1


def test_with_an_adapter(duplicate):
    check(wan().load(wan().quantized(), wan().adapter()), duplicate, wan())


def test_with_a_fused_adapter(duplicate):
    """Either is unfused by itself."""
    model = wan().load(wan().quantized(), wan().adapter())
    adapted, before = wan().run(model), tensors(model)
    model.fuse_lora()
    fused = wan().run(model)
    twin = duplicate(model)
    assert torch.equal(wan().run(twin), fused)
    twin.unfuse_lora()
    assert same(tensors(twin), before) and torch.equal(wan().run(twin), adapted)
    assert torch.equal(wan().run(model), fused)
