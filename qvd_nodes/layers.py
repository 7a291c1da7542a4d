"""int8 layers for ComfyUI: its own layers on the outside, QVD's on the inside.

ComfyUI loads, offloads, casts and patches `weight` and `bias`; a call then hands what came of that to a layer of
`qvd_core`, which does all the arithmetic. That inner layer is built again only when the weight is another object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.clock import SamplingClock
from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic
from qvd_core.layer_kinds import layer_kind, register_layer_class
from qvd_core.layers import QuantizedLayer
from qvd_core.plan import plan_to_list
from qvd_nodes._comfy import QuantizedTensor, ops
from qvd_nodes.inner_layers import ComfyTemporalLinear, Inner, inner_layer
from qvd_nodes.layout import CALIBRATED, LAYOUT_NAME, QVDInt8Layout, QVDTensor, is_quantized

FORMAT = "qvd_int8"
"""The name of QVD's layers in `comfy_quant` entries; ComfyUI without QVD refuses it by this name."""
FORMAT_VERSION = 1
_STORED_WITH_WEIGHT = ("weight_scale", *CALIBRATED, "comfy_quant")


class QuantizedOp(nn.Module):
    """What QVD's layers have in common, before one of ComfyUI's own layer classes in the order of bases.

    Until it is given a quantized weight, such a layer is ComfyUI's own.
    clock: of the model, for scales that follow the timestep or the frame.
    """

    weight: Any
    bias: Any
    weight_function: list[Callable[[Tensor], Tensor]]
    bias_function: list[Callable[[Tensor], Tensor]]
    clock: SamplingClock | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not is_quantized(self.weight):
            return super().forward(input, *args, **kwargs)
        if args or any(value is not None for value in kwargs.values()):
            raise QVDError(f"an int8 {type(self).__name__} takes no other arguments than its input.")
        if torch.compiler.is_compiling():
            known: Inner | None = self.__dict__.get("_known")
            resident = known is not None and known.device == input.device and not self._patches()
            return known.layer(input) if resident else self._untraced(input)  # type: ignore[union-attr]
        ops.run_every_op()
        if self._is_temporal():
            return self._temporal_layer(input.device)(input)
        with self._cast(input.device) as (weight, bias):
            return self._layer_of(weight, bias)(input)

    @contextmanager
    def _cast(self, device: torch.device) -> Iterator[tuple[QuantizedTensor, Tensor | None]]:
        """The weight and bias where they are needed, with every patch that is not yet in them.

        The weight stays quantized: one that a patch has made float is quantized again, so that a LoRA gives the same
        video whether its layer is offloaded or not.
        """
        cast = ops.cast_bias_weight(
            self,
            dtype=self.weight.dtype,
            device=device,
            bias_dtype=self.weight.dtype if self.bias is None else self.bias.dtype,
            offloadable=True,
            compute_dtype=torch.float32,
            want_requant=True,
        )
        weight, bias, _ = cast
        try:
            if not is_quantized(weight):
                weight = self._requantized(weight)
            yield weight, bias
        finally:
            ops.uncast_bias_weight(self, *cast)

    def _layer_of(self, weight: QuantizedTensor, bias: Tensor | None) -> QuantizedLayer:
        """The layer of the core with these tensors; the last one when they are the same and here to stay.

        What was sent for one call is not kept: offloaded weights would pile up on the GPU.
        """
        if weight is not self.weight and weight is not self.__dict__.get("_v_weight"):
            return inner_layer(self, weight, bias)
        return self._remembered((weight, weight._params.scale, bias, self.clock), weight.device, weight, bias)

    def _temporal_layer(self, device: torch.device) -> QuantizedLayer:
        """A temporal projection, with a table of its outputs that lives as long as nothing they depend on changes.

        It asks for its weight only for a timestep that is not in the table, so that the weight may stay offloaded.
        """
        weight, functions = self.weight, self._patches()
        state = (weight, weight._params.scale, self.bias, *functions)
        resident = weight.device == device and not functions
        small = weight if resident else QVDTensor(weight._qdata, LAYOUT_NAME, weight._params.to_device(device))
        layer = self._remembered(state, device, small, self.bias if resident else None)
        assert isinstance(layer, ComfyTemporalLinear)
        layer.operands = None if resident else self._float_operands
        return layer

    def _remembered(
        self, state: tuple[Any, ...], device: torch.device, weight: QuantizedTensor, bias: Tensor | None
    ) -> QuantizedLayer:
        known: Inner | None = self.__dict__.get("_known")
        if known is None or not known.holds_for(state, device):
            # Not as a submodule: it is no part of the model, and must neither be moved nor saved with it.
            known = self.__dict__["_known"] = Inner(state, device, inner_layer(self, weight, bias))
        return known.layer

    def _patches(self) -> tuple[Any, ...]:
        """What ComfyUI applies to weight and bias at every call."""
        lowvram = [getattr(self, f"{name}_lowvram_function", None) for name in ("weight", "bias")]
        return (*self.weight_function, *self.bias_function, *(patch for patch in lowvram if patch is not None))

    def _float_operands(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """float32 weight [N, C] and bias [N] of a temporal projection on `device`."""
        with self._cast(device) as (weight, bias):
            inner = inner_layer(self, weight, bias)
            return inner.dequantized_weight(), None if inner.bias is None else inner.bias.detach().clone().float()

    def prepare(self) -> None:
        """Build the inner layer now, where the weight is there to stay; a traced program cannot build it."""
        if not is_quantized(self.weight) or self._patches():
            return
        if self._is_temporal():
            self._temporal_layer(self.weight.device)
        else:
            self._layer_of(self.weight, self.bias)

    def _is_temporal(self) -> bool:
        return bool(self.weight._params.recipe.plan.kind == "temporal")

    @torch.compiler.disable
    def _untraced(self, input: Tensor) -> Tensor:
        return self.forward(input)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """ComfyUI asks for the float weight that a patch is to change."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """ComfyUI hands back the patched float weight: quantize it as the layer was calibrated."""
        changed: Tensor = weight.to(self.weight.dtype)
        if is_quantized(self.weight):
            changed = self._requantized(weight)
        if return_weight:
            return changed
        self.weight = nn.Parameter(changed, requires_grad=False)
        return None

    def convert_bias(self, bias: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """ComfyUI asks for the float bias that a patch is to change: without the input shift's share."""
        share = self._shift_share()
        return bias if share is None or not is_quantized(self.weight) else bias + share.to(bias)

    def set_bias(
        self, bias: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **_: Any
    ) -> Tensor | None:
        """ComfyUI hands back the patched float bias."""
        share = self._shift_share()
        changed = (bias if share is None else bias - share.to(bias)).to(self.bias.dtype)
        if return_weight:
            return changed
        self.bias = nn.Parameter(changed, requires_grad=False)
        return None

    def _shift_share(self) -> Tensor | None:
        """float32 [N]: the float bias less the stored one; the same whatever is merged into the weight."""
        if not is_quantized(self.weight):
            return None
        share: Tensor | None = QVDInt8Layout.requantize_kwargs(self.weight).get("carried")
        return share

    def _requantized(self, weight: Tensor) -> QuantizedTensor:
        """A float weight on the original input, quantized as this layer's own; its own codes where nothing changed."""
        own = self.weight.to(weight.device)
        params = own._params
        if torch.equal(own.to(weight.dtype).dequantize(), weight):
            return own
        if params.recipe.spec.portable:
            raise QVDError(
                "this MODEL was quantized with portable=True: other layers hold a part of this one's weight, so that "
                "no LoRA can be added any more. Put the LoRA loader before QVD Quantize Model."
            )
        if not bool(weight.isfinite().all()):
            raise QVDError("a patched weight of an int8 layer holds NaN or infinity: the LoRA is damaged, remove it.")
        changed: QuantizedTensor = own.requantize_from_float(weight).to(own.dtype)
        return changed

    def __getattr__(self, name: str) -> Any:
        """Every entry of the state dict is an attribute, too: hooks and model merges of ComfyUI look for them."""
        if name in _STORED_WITH_WEIGHT:
            weight = self.__dict__["_parameters"].get("weight")
            if is_quantized(weight) and name in (stored := stored_tensors(self)):
                return stored[name]
        return super().__getattr__(name)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        if not is_quantized(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        entries = {} if destination is None else destination
        entries.update({f"{prefix}{name}": tensor for name, tensor in stored_tensors(self).items()})
        return entries

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight: Any = state_dict.get(f"{prefix}weight")
        if not is_quantized(weight):
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        shape = tuple(self.weight.shape) if self.weight is not None else weight.shape  # unset where loading is lazy
        if tuple(weight.shape) != tuple(shape):
            raise QVDError(f"{prefix}weight is {list(weight.shape)}, this model's is {list(shape)}: another model.")
        dtype = weight.dtype if self.weight is None else self.weight.dtype
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        bias = state_dict.get(f"{prefix}bias")
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move or cast; a tensor that is there already stays the very same one.

        PyTorch would write into a quantized tensor, and ComfyUI's way, to wrap every parameter anew, fails for the
        tensors of its inference mode when a model is moved outside of it.
        """
        self.__dict__.pop("_known", None)  # it holds the tensors that were here before
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            moved = fn(parameter)
            if moved is parameter or moved is parameter.data:
                continue
            if moved.is_inference() and not torch.is_inference_mode_enabled():
                moved = moved.clone()
            self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self


class Linear(QuantizedOp, ops.manual_cast.Linear):
    """A linear layer of ComfyUI whose weight may be QVD's int8; a temporal projection where its recipe says so."""


class Conv2d(QuantizedOp, ops.manual_cast.Conv2d):
    """A 2-D convolution of ComfyUI whose weight may be QVD's int8."""


class Conv3d(QuantizedOp, ops.manual_cast.Conv3d):
    """A 3-D convolution of ComfyUI whose weight may be QVD's int8."""


class QVDOperations(ops.manual_cast):
    """The set of layers that ComfyUI builds a model of when it loads a file of QVD."""

    Linear = Linear
    Conv2d = Conv2d
    Conv3d = Conv3d


_OUTER_CLASSES: dict[type[nn.Module], type[QuantizedOp]] = {nn.Linear: Linear, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def outer_layer(source: nn.Module, weight: QuantizedTensor, bias: Tensor | None) -> QuantizedOp:
    """QVD's layer in the place of a float one of ComfyUI: all its settings, other tensors."""
    outer_class = next(outer for base, outer in _OUTER_CLASSES.items() if isinstance(source, base))
    layer = outer_class.__new__(outer_class)
    nn.Module.__init__(layer)
    own = layer.__dict__
    own.update({name: value for name, value in source.__dict__.items() if name not in own})
    layer.training = source.training
    layer.comfy_cast_weights = True  # type: ignore[assignment]
    layer.weight_function, layer.bias_function = [], []
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def stored_tensors(layer: QuantizedOp) -> dict[str, Tensor]:
    """Every entry of a quantized layer in a checkpoint, by name below the layer."""
    params: QVDInt8Layout.Params = layer.weight._params
    entries = {"weight": layer.weight._qdata, "weight_scale": params.scale}
    bias = None if layer.bias is None else layer.bias.detach()
    if params.fold is not None:
        bias = params.fold.to(params.orig_dtype) if bias is None else bias + params.fold.to(bias)
    if bias is not None:
        entries["bias"] = bias
    entries.update({name: tensor for name in CALIBRATED if (tensor := getattr(params, name)) is not None})
    entries["comfy_quant"] = _description(params)
    return entries


def _description(params: QVDInt8Layout.Params) -> Tensor:
    """The `comfy_quant` entry, uint8 JSON: enough to rebuild the layer where the file's metadata are lost."""
    recipe = params.recipe
    assert recipe is not None
    entry = {"format": FORMAT, "version": FORMAT_VERSION, "shape": list(params.orig_shape)}
    text = json.dumps({**entry, "plan": plan_to_list(recipe.plan), "spec": recipe.spec.to_dict()})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedOp]:
    """The layers of a model of ComfyUI that QVD has quantized, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedOp) and is_quantized(module.weight)
    }


def count_layers(model: nn.Module) -> int:
    """Linear and convolution layers of a model of ComfyUI, quantized or not, built of QVD's layers or of others."""
    return sum(isinstance(module, QuantizedOp) or layer_kind(module) is not None for module in model.modules())


def attach_clock(model: nn.Module) -> None:
    """Tell the layers whose scales change while sampling what is being sampled, through one hook on the model."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), SamplingClock):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    layers = [
        layer for layer in quantized_layers(model).values() if layer.weight._params.recipe.plan.steps_by != "layer"
    ]
    if not layers:
        return
    clock = SamplingClock(model, family_or_generic(model))
    model.register_forward_pre_hook(clock.read, with_kwargs=True)
    for layer in layers:
        layer.clock = clock


for _operations in (ops.disable_weight_init, ops.manual_cast):  # they compute what PyTorch's layers do
    register_layer_class(_operations.Linear, "linear")
    register_layer_class(_operations.Conv2d, "conv2d")
    register_layer_class(_operations.Conv3d, "conv3d")
