"""Checkpoints of a quantized model outside diffusers: one safetensors file, its plan and settings in the metadata."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.checks import stored_problem
from qvd_core.convert import fill_layer, install_layers
from qvd_core.errors import QVDError
from qvd_core.files import read_tensors, write_tensors
from qvd_core.layers import QuantizedLayer
from qvd_core.plan import LayerPlan, plan_from_dict, plan_to_dict
from qvd_core.shared_input import share_inputs
from qvd_core.spec import QuantSpec

FORMAT_VERSION = 1


def plan_of(model: nn.Module) -> dict[str, LayerPlan]:
    """The plan a quantized model was made by, as its layers remember it."""
    return {name: module.plan for name, module in _quantized(model).items()}


def save_checkpoint(model: nn.Module, path: str | Path) -> Path:
    """Write a quantized model's whole state dict, atomically. Raises QVDError when it is not quantized."""
    layers = _quantized(model)
    if not layers:
        raise QVDError(f"{type(model).__name__} holds no quantized layer: quantize_model it before save_checkpoint.")
    first = next(iter(layers.values()))
    description = {
        "kind": "checkpoint",
        "version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "spec": first.spec.to_dict(),
        "layers": plan_to_dict(plan_of(model)),
    }
    return write_tensors(path, model.state_dict(), description)


@torch.no_grad()
def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a float model of the same class (its tensors may be on meta) into the quantized one of a file, in place.

    Raises QVDError, before anything is changed, when the file is missing, damaged, newer, of another model, or holds
    missing, unexpected, mis-shaped or senseless tensors.
    """
    tensors, description = read_tensors(path, "checkpoint")
    _check_origin(path, description, model)
    plan = plan_from_dict(description["layers"])
    try:
        spec = QuantSpec.from_dict(description["spec"])
    except (TypeError, ValueError) as error:
        raise QVDError(f"{path} is damaged, or from a newer QVD: {error}") from error
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # The skeleton is built beside the model, so that a bad file leaves the model as it is.
    with torch.device("meta"):
        skeleton = install_layers(_meta_copy(model), plan, spec, dtype)
    _check_tensors(path, tensors, skeleton.state_dict())
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    install_layers(model, plan, spec, dtype)
    for name, module in model.named_modules():
        own = {key: tensors[f"{name}.{key}" if name else key].to(device) for key in _own_tensors(module)}
        if isinstance(module, QuantizedLayer):
            fill_layer(module, own)
        else:
            _fill_float(module, own)
    share_inputs(model)
    return model


def _quantized(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def _check_origin(path: str | Path, description: Mapping[str, Any], model: nn.Module) -> None:
    if description.get("kind") != "checkpoint" or not isinstance(description.get("version"), int):
        raise QVDError(f"{path} is not a checkpoint of QVD.")
    if description["version"] > FORMAT_VERSION:
        raise QVDError(
            f"{path} has format {description['version']}, this QVD reads up to {FORMAT_VERSION}: update QVD."
        )
    if description.get("model_class") != type(model).__name__:
        raise QVDError(f"{path} holds a {description.get('model_class')}, the model is a {type(model).__name__}.")
    if not isinstance(description.get("spec"), dict) or not isinstance(description.get("layers"), dict):
        raise QVDError(f"{path} is damaged: its description lacks the settings or the layers.")


def _meta_copy(model: nn.Module) -> nn.Module:
    """The model's modules with every tensor on meta; the model itself is not touched."""
    memo = {id(tensor): _meta_twin(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _meta_twin(tensor: Tensor) -> Tensor:
    twin = tensor.detach().to("meta")
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise QVDError(f"{path} does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    for name, tensor in tensors.items():
        wanted = expected[name]
        castable = tensor.is_floating_point() and wanted.is_floating_point()
        if tensor.shape != wanted.shape or (tensor.dtype != wanted.dtype and not castable):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise QVDError(f"{path}: {name} is {found}, expected {wanted.dtype} {list(wanted.shape)}.")
        problem = stored_problem(name.rpartition(".")[2], tensor)
        if problem:
            raise QVDError(f"{path}: {name} {problem}: the file is damaged.")


def _own_tensors(module: nn.Module) -> list[str]:
    """Names of the tensors a module itself has in a state dict."""
    kept = [name for name, tensor in module._parameters.items() if tensor is not None]
    hidden = module._non_persistent_buffers_set
    return kept + [name for name, tensor in module._buffers.items() if tensor is not None and name not in hidden]


def _fill_float(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        own = getattr(module, name)
        value = value.to(own.dtype)
        if isinstance(own, nn.Parameter):
            value = nn.Parameter(value, requires_grad=own.requires_grad)
        setattr(module, name, value)
