"""Fills a skeleton model while its checkpoint is read, tensor by tensor, in whatever order and file they come.

At no time is more than one layer of the full-precision model in memory beside what the files map: a layer is quantized
as soon as the last of its tensors is here, and only its codes are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qvd_core.checks import cast_finite, check_finite, stored_problem
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_core.plan import LayerPlan
from qvd_core.spec import QuantSpec

Device = torch.device | str | int

QUANTIZED_ALREADY = (
    "this checkpoint is quantized already. Load it without a quantization_config, or quantize the full-precision model."
)


@dataclass
class Encoder:
    """Quantizes a layer once its float tensors are complete.

    encoding: how the model is quantized. with_bias: the planned layers whose float version has a bias.
    """

    encoding: Encoding
    with_bias: frozenset[str]
    waiting: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, layer: str, suffix: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Take one float tensor; returns the layer's quantized tensors when it was the last one, else None."""
        if not _is_float(tensor):
            raise QVDError(f"{layer}.{suffix} is {tensor.dtype}: {QUANTIZED_ALREADY}")
        with self.lock:  # diffusers may read several shards at once
            arrived = self.waiting.setdefault(layer, {})
            arrived[suffix] = tensor
            if arrived.keys() != self.float_tensors(layer):
                return None
            del self.waiting[layer]
        return self.encoding.encode(layer, arrived["weight"], arrived.get("bias"))

    def float_tensors(self, layer: str) -> set[str]:
        """The tensors the float version of a layer has in the checkpoint."""
        return {"weight", "bias"} if layer in self.with_bias else {"weight"}


def split_name(name: str) -> tuple[str, str]:
    """("blocks.0.proj", "weight") for "blocks.0.proj.weight"."""
    layer, _, suffix = name.rpartition(".")
    return layer, suffix


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of one module itself that belong into a checkpoint (they may still be empty), by name."""
    parameters = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    buffers = {
        name: tensor
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }
    return {**parameters, **buffers}


def place(module: nn.Module, suffix: str, value: Tensor, device: Device, copy: bool = True) -> None:
    """Put `value` where `module` has the empty tensor `suffix`. `copy`: unless it is known to be new."""
    # A copy: a view into the mapped file has the file's alignment, and with it other rounding in float32 kernels.
    value = value.detach().to(device, copy=copy)
    if suffix in module._parameters:
        empty = module._parameters[suffix]
        requires_grad = empty is not None and empty.requires_grad and value.is_floating_point()
        module._parameters[suffix] = nn.Parameter(value, requires_grad=requires_grad)
    else:
        module._buffers[suffix] = value


def place_encoded(module: QuantizedLayer, name: str, tensors: Mapping[str, Tensor], device: Device) -> None:
    """Fill a quantized layer with the result of `encode_layer`; the codebook of a temporal layer may come later."""
    empty = stored_tensors(module)
    for suffix, value in tensors.items():
        if suffix == "weight":  # codes just made: the largest tensor is not copied once more
            place(module, suffix, value, device, copy=False)
        else:
            place(module, suffix, matching(value, empty[suffix], f"{name}.{suffix}"), device)


def expect_float_weights(model: nn.Module) -> None:
    """Give every empty quantized layer a weight of the float weight's shape until its codes are there.

    diffusers compares each tensor that arrives with the skeleton, and packed 4-bit codes have another shape.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            codes = torch.empty(module.weight_shape, dtype=torch.int8, device="meta")
            module.weight = nn.Parameter(codes, requires_grad=False)


def matching(value: Tensor, placeholder: Tensor, name: str) -> Tensor:
    """`value` in the type of `placeholder`; a floating-point parameter may change precision, nothing else may differ.

    Raises QVDError that names the tensor, what was found and what was expected.
    """
    castable = isinstance(placeholder, nn.Parameter) and _is_float(value) and _is_float(placeholder)
    if value.shape != placeholder.shape or (value.dtype != placeholder.dtype and not castable):
        raise QVDError(
            f"{name} is {_describe(value)} in the checkpoint, expected {_describe(placeholder)}: "
            "config.json and the weights do not belong together."
        )
    return cast_finite(name, value, placeholder.dtype)


def unquantized(value: Tensor, placeholder: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`, for a tensor that stays as it is in the quantized model.

    Raises QVDError where it is something else than the model's `placeholder`, and for NaN and infinity.
    """
    if placeholder.is_floating_point() and not _is_float(value):
        raise QVDError(
            f"{name} is {value.dtype}, but this model keeps it in floating point: the checkpoint was quantized by "
            "another tool, or is damaged. Quantize the full-precision model."
        )
    if not placeholder.is_floating_point():
        return matching(value, placeholder, name)
    check_finite(name, value)
    cast = cast_finite(name, value, dtype)
    check_finite(name, cast)
    return cast


def check_stored_values(value: Tensor, name: str, bits: int = 8) -> None:
    """Raise QVDError for values a quantized checkpoint cannot hold: NaN, steps that are not positive, ...

    bits: of the codes, as config.json has it; 5 to 8 are all stored as int8.
    """
    suffix = split_name(name)[1]
    problem = stored_problem(suffix, value)
    if problem:
        raise QVDError(f"{name} {problem}: the checkpoint is damaged, quantize the model again.")
    if suffix == "weight" and value.dtype == torch.int8 and bits < 8 and value.numel():
        limit = 2 ** (bits - 1) - 1
        if value.amin() < -limit or value.amax() > limit:
            raise QVDError(
                f"{name} holds codes of more than the {bits} bits that config.json says: "
                "config.json and the weights do not belong together."
            )


def check_recorded_plan(plan: Mapping[str, LayerPlan], spec: QuantSpec) -> None:
    """Raise QVDError when a config.json contradicts itself: its settings are not those its layers were made with."""
    static = any("activation_scale" in layer.tensors for layer in plan.values())
    if static != spec.is_static:
        found = "calibrated activation scales" if static else "no activation scales"
        raise QVDError(
            f"config.json says activation={spec.activation!r}, but the layers it lists have {found}: it was edited, or "
            "mixed from two models. Other settings need another quantization of the full-precision model."
        )


def names_of_codes(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors whose type only quantized weights have: 8-bit integers and floats."""
    return [name for name, tensor in tensors.items() if tensor.element_size() == 1 and tensor.dtype != torch.bool]


def owner_of(name: str) -> str:
    """The layer that a tensor is about: "proj" for "proj.weight", "proj.scale" and "proj.weight.absmax"."""
    return split_name(name)[0].removesuffix(".weight")


def check_savable(tensors: Mapping[str, Tensor], plan: Iterable[str]) -> None:
    """Raise QVDError for a state dict that could not be loaded again: of adapters, cast or offloaded layers."""
    if any(".base_layer." in name for name in tensors):
        raise QVDError(
            "the model holds an adapter (LoRA): unload it before saving; a fused one leaves its weights behind."
        )
    for layer in plan:
        tensor = tensors.get(f"{layer}.weight")
        scale = tensors.get(f"{layer}.weight_scale")
        if tensor is None or scale is None or tensor.is_meta:
            raise QVDError(f"layer {layer} is not in memory, or was exchanged: save the model before changing it.")
        if not scale.is_meta and not bool((scale > 0).all()):
            raise QVDError(f"the tensors of layer {layer} are offloaded to disk: save the model before enabling that.")
    cast = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.element_size() < 2]
    if cast:
        raise QVDError(f"{enumerate_names(cast)} is cast to 8 bits (layerwise casting): save the model before that.")


def enumerate_names(names: Iterable[str], limit: int = 3) -> str:
    """A short list for a message: the first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _is_float(tensor: Tensor) -> bool:
    """Whether it is in floating point of 16 bits or more."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
