"""Let diffusers rebuild blocks of a quantized model: some features copy a block's weights into a block of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qvd_core.errors import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_core.requantize import skeleton
from qvd_diffusers.float_weights import float_skeleton


@contextmanager
def rebuilding(model: nn.Module) -> Iterator[nn.Module]:
    """Hide the quantized layers of `model` while diffusers exchanges the blocks around them:

        with rebuilding(pipe.unet):
            pipe.enable_free_noise(context_length=16)

    Inside, every quantized layer is an empty float layer of the same shape that takes no memory, so that blocks of
    another class can be made and filled from the old ones. Afterwards the quantized layers are back, in the new blocks;
    after an error in the old ones. Without this, `enable_free_noise` and `disable_free_noise` fail on what the
    quantized layers have in their state dict.

    Raises QVDError when the layer a quantized one belongs to is gone.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    original = dict(float_skeleton(model).named_modules())
    hidden = {name: skeleton(layer, _had_bias(layer, original.get(name))) for name, layer in layers.items()}
    for name, twin in hidden.items():
        model.set_submodule(name, twin)
    try:
        yield model
    finally:
        places = _places(model, hidden)
        for name, place in places.items():
            model.set_submodule(place, layers[name])
    lost = [name for name in layers if name not in places]
    if lost:
        raise QVDError(
            f"{lost[0]} and {len(lost) - 1} more quantized layers have no place in the rebuilt {type(model).__name__}: "
            "change the full-precision model, then quantize it."
        )


def _had_bias(layer: QuantizedLayer, original: nn.Module | None) -> bool:
    """Whether the float layer had a bias: calibration may have given the quantized one its first."""
    return layer.bias is not None and getattr(original, "bias", layer.bias) is not None


def _places(model: nn.Module, hidden: dict[str, nn.Module]) -> dict[str, str]:
    """Where each hidden layer is now: wherever its twin went, else where a float layer of its kind has its name."""
    modules = dict(model.named_modules())
    moved = {id(module): name for name, module in modules.items()}
    places = {}
    for name, twin in hidden.items():
        there = modules.get(name)
        if id(twin) in moved:
            places[name] = moved[id(twin)]
        elif type(there) is type(twin) and there.weight.shape == twin.weight.shape:
            places[name] = name
    return places
