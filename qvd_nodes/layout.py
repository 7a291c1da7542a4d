"""QVD's quantized weight as one tensor of ComfyUI: codes, scales and everything calibrated travel together.

ComfyUI moves, offloads, patches, backs up and restores a weight as a whole. What belongs to the weight must go with it:
a merged LoRA changes the codes, their scale and what the input shift adds to the bias, all at once. The layout has a
name of its own, so that none of ComfyUI's shortcuts for its own int8 format bypasses the calibrated scales.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvd_core.packing import pack_int4, unpack_int4
from qvd_core.plan import LayerPlan
from qvd_core.rotation import hadamard
from qvd_core.spec import QuantSpec
from qvd_core.weights import fold_transform, per_input_channel, sum_over_inputs
from qvd_nodes._comfy import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class

LAYOUT_NAME = "QVDInt8Layout"

CALIBRATED = (
    "input_shift",
    "input_scale",
    "activation_scale",
    "bucket_boundaries",
    "levels",
    "boundaries",
    "offset",
    "gain",
)
"""The float32 tensors a layer may have beside its codes and their scale, named as in a checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantized: no tensors, equal for equal layers."""

    plan: LayerPlan
    spec: QuantSpec

    @property
    def weight_bits(self) -> int:
        return self.plan.weight_bits(self.spec)


class QVDTensor(QuantizedTensor):
    """The weight itself. Beside what ComfyUI's quantized tensors can do, it may be written into.

    Scheduled LoRAs (hooks) do that, with float weights as well as quantized ones. Codes and scales change together, in
    this tensor and in every other view of it (`detach`, `data`); no tensor of the parameters is ever written into.
    """

    def _copy_with(
        self, qdata: Tensor | None = None, params: Any | None = None, clone_params: bool = True
    ) -> QVDTensor:
        if params is None:
            params = self._params.clone() if clone_params else self._params
        return QVDTensor(self._qdata if qdata is None else qdata, self._layout_cls, params)

    def detach(self) -> QVDTensor:
        """A view. PyTorch's own cannot make one in inference mode of a tensor from outside; `nn.Parameter` wants it."""
        return self._copy_with(qdata=self._qdata.detach(), clone_params=False)

    @staticmethod
    def __tensor_unflatten__(inner_tensors: Any, context: Any, outer_size: Any, outer_stride: Any) -> QVDTensor:
        plain = QuantizedTensor.__tensor_unflatten__(inner_tensors, context, outer_size, outer_stride)
        return QVDTensor(plain._qdata, plain._layout_cls, plain._params)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]._copy_with(qdata=args[0]._qdata.detach(), clone_params=False)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], QVDTensor):
            return _write(args[0], args[1])
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, QVDTensor) and result is args[0] and _asks_for_copy(func, args, kwargs or {}):
            return result._copy_with(qdata=result._qdata.clone())  # `to(copy=True)` gives itself in inference mode
        return result


def _asks_for_copy(operator: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in operator._schema.arguments]
    if "copy" not in names:
        return False
    place = names.index("copy")
    return bool(kwargs.get("copy", args[place] if len(args) > place else False))


def _write(weight: QVDTensor, source: Tensor) -> QVDTensor:
    """Give a weight the codes and scales of another one of the same layer, or those of a float weight."""
    device = weight._qdata.device
    if isinstance(source, QuantizedTensor):
        quantized = source
    else:
        quantized = weight.requantize_from_float(source.to(device, torch.float32))
    params, other = weight._params, quantized._params.to_device(device)
    weight._qdata.copy_(quantized._qdata)
    for name in ("scale", *CALIBRATED, "fold"):
        object.__setattr__(params, name, getattr(other, name))
    return weight


class QVDInt8Layout(QuantizedLayout):
    """int8 (or packed 4-bit) codes of a transformed weight W~ = W diag(scale) H, for inputs H (x - shift) / scale."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """Beside what every layout has: `scale` float32 [N, 1, ...], `orig_dtype`, `orig_shape`.

        recipe: how the layer is quantized. The tensors of `CALIBRATED`: see `qvd_core.layers`.
        fold: float32 [N] that the bias lacks, because the weight was changed after it was quantized (a merged LoRA).
        """

        recipe: Recipe | None = None
        input_shift: Tensor | None = None
        input_scale: Tensor | None = None
        activation_scale: Tensor | None = None
        bucket_boundaries: Tensor | None = None
        levels: Tensor | None = None
        boundaries: Tensor | None = None
        offset: Tensor | None = None
        gain: Tensor | None = None
        fold: Tensor | None = None

        def _tensor_fields(self) -> list[str]:
            return [name for name in ("scale", *CALIBRATED, "fold") if getattr(self, name) is not None]

    @classmethod
    def quantize(
        cls, tensor: Tensor, *, like: Params, carried: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Params]:
        """Quantize a float weight [N, K, ...] on the original input as another weight of the same layer was.

        like: that other weight's parameters; shift, scale, rotation and steps stay, the codes and their scale are new.
        carried: what the bias lacked before, less the shift's share of the other weight; see `requantize_kwargs`.
        """
        recipe = like.recipe
        assert recipe is not None
        weight = tensor.float()
        channels = weight.shape[1]
        shift = weight.new_zeros(channels) if like.input_shift is None else like.input_shift.to(weight.device)
        scale = weight.new_ones(channels) if like.input_scale is None else like.input_scale.to(weight.device)
        quantized, folded = fold_transform(
            weight, None, shift, scale, mean=None, bits=recipe.weight_bits, rotation=recipe.plan.rotation
        )
        codes = pack_int4(quantized.codes) if recipe.weight_bits == 4 else quantized.codes
        fold = None if carried is None else folded + carried.to(folded.device)
        params = dataclasses.replace(
            like.to_device(weight.device), scale=quantized.scale, orig_dtype=tensor.dtype, fold=fold
        )
        return codes, params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The float weight [N, K, ...] that acts on the original input, in `orig_dtype`."""
        return dequantized(qdata, params).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """The codes as they are stored, and their scale."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """Codes and scale, by what follows "weight" in their names; the layer itself adds what is calibrated."""
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """What `quantize` needs to put a changed weight in the place of `qtensor`."""
        params = qtensor._params
        if params.input_shift is None:
            return {"like": params}
        # bias + fold = b + W shift: of the sum only W's share changes with the weight. METHOD 3.5.
        share = sum_over_inputs(dequantized(qtensor._qdata, params), params.input_shift).float()
        return {"like": params, "carried": -share if params.fold is None else params.fold - share}


def dequantized(codes: Tensor, params: QVDInt8Layout.Params) -> Tensor:
    """The float32 weight [N, K, ...] that acts on the original input."""
    recipe = params.recipe
    assert recipe is not None
    shape = torch.Size(params.orig_shape)
    plain = unpack_int4(codes, shape) if recipe.weight_bits == 4 else codes
    weight = hadamard(plain.float() * params.scale, recipe.plan.rotation, dim=1)  # its own inverse
    return weight if params.input_scale is None else weight / per_input_channel(params.input_scale, weight)


def is_quantized(weight: object) -> bool:
    """Whether a weight is quantized by QVD."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT_NAME


def quantized_weight(
    tensors: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, recipe: Recipe
) -> QVDTensor:
    """One layer's quantized weight from its entries in a checkpoint ("weight", "weight_scale", ...).

    shape: of the float weight. dtype: what ComfyUI is told the weight's type is, that of the float layers around it.
    """
    calibrated = {name: tensors[name] for name in CALIBRATED if name in tensors}
    params = QVDInt8Layout.Params(
        scale=tensors["weight_scale"], orig_dtype=dtype, orig_shape=tuple(shape), recipe=recipe, **calibrated
    )
    return QVDTensor(tensors["weight"], LAYOUT_NAME, params)


register_layout_class(LAYOUT_NAME, QVDInt8Layout)
