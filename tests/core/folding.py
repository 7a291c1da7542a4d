"""Shift and scale around a float model: what quantized layers and producer folds do to it, without any rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from qvd_core import QuantSpec, find_family
from qvd_core.families import Family
from qvd_core.folds import TensorEdit, fold_sites, producer_edits
from qvd_core.plan import quantizable_layers
from qvd_core.transform import Transform
from qvd_core.weights import per_input_channel, sum_over_inputs

if TYPE_CHECKING:  # the tests of ComfyUI's models come here too, without diffusers
    from tests.tiny_models import TinyFamily


def family_of(tiny: TinyFamily) -> Family:
    family = find_family(tiny.model)
    assert family is not None
    return family


def gemm_layers(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    layers = quantizable_layers(model, family, QuantSpec())
    return {name: layer for name, layer in layers.items() if not family.is_temporal(name)}


def random_transform(channels: int, generator: torch.Generator, shift: float = 1.0, spread: float = 0.5) -> Transform:
    """Shifts of rms `shift`, log-normal scales within [0.2, 5]."""
    scale = (spread * torch.randn(channels, generator=generator)).exp().clamp(0.2, 5.0)
    return Transform("random", shift * torch.randn(channels, generator=generator), scale)


def random_transforms(model: nn.Module, family: Family, seed: int = 0, **choice: float) -> dict[str, Transform]:
    """One transform per GEMM layer; layers of one group or one fold site share theirs."""
    generator = torch.Generator().manual_seed(seed)
    owner: dict[str, str] = {}
    for site in fold_sites(model, family):
        for consumer in site.consumers:
            owner[consumer] = site.consumers[0]
    shared: dict[str, Transform] = {}
    transforms: dict[str, Transform] = {}
    for name, layer in gemm_layers(model, family).items():
        group = owner.get(name, family.input_group(name))
        if group not in shared:
            shared[group] = random_transform(layer.weight.shape[1], generator, **choice)
        transforms[name] = shared[group]
    return transforms


def edit_tensors(model: nn.Module, edits: Mapping[str, TensorEdit]) -> None:
    parameters = dict(model.named_parameters())
    for name, edit in edits.items():
        assert edit.name == name
        parameters[name].data = edit.apply(parameters[name].data)


def fold_into_layers(model: nn.Module, transforms: Mapping[str, Transform]) -> None:
    """The consumers' side, as `weights.fold_transform` does it, without rounding: W diag(s), b + W z."""
    for name, transform in transforms.items():
        layer = model.get_submodule(name)
        bias = sum_over_inputs(layer.weight, transform.shift)
        if layer.bias is not None:
            bias = bias + layer.bias.double()
        layer.weight.data = layer.weight * per_input_channel(transform.scale, layer.weight)
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)


def transform_inputs(model: nn.Module, remainders: Mapping[str, Transform], pad_first: bool = True) -> None:
    """What quantized layers do at run time, without rounding: pad, then (x - shift) / scale."""
    for name, remainder in remainders.items():
        layer = model.get_submodule(name)
        padding = (
            layer._reversed_padding_repeated_twice if isinstance(layer, nn.Conv2d | nn.Conv3d) and pad_first else ()
        )
        if padding:
            layer.padding = (0,) * len(layer.kernel_size)
        layer.register_forward_pre_hook(partial(_transform_input, remainder, padding), with_kwargs=True)


def _transform_input(remainder: Transform, padding, layer, args, kwargs):
    x = F.pad(args[0] if args else kwargs["input"], padding)
    shape = (1, -1, *[1] * (x.dim() - 2)) if isinstance(layer, nn.Conv2d | nn.Conv3d) else (-1,)
    x = (x - remainder.shift.view(shape)) / remainder.scale.view(shape)
    return (x,), {key: value for key, value in kwargs.items() if key != "input"}


@torch.no_grad()
def output_error(
    tiny: TinyFamily, transforms: Mapping[str, Transform], family: Family, layers_first: bool = False
) -> float:
    """rms of the output's change over its own rms, after edits of producers and layers."""
    model = copy.deepcopy(tiny.model)
    edits, remainders = producer_edits(model, family, transforms)
    if layers_first:
        fold_into_layers(model, transforms)
        edit_tensors(model, edits)
    else:
        edit_tensors(model, edits)
        fold_into_layers(model, transforms)
    transform_inputs(model, remainders)
    expected = tiny.forward(tiny.model)
    return float((tiny.forward(model) - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def is_identity(transform: Transform) -> bool:
    return transform.parts == 0
