"""Adapters of peft on int8 layers: loading and running needs nothing, merging ("fusing") into the weight does.

peft adds an adapter's delta to `base_layer.weight.data`, which int8 codes cannot take: in place it fails, by way of a
copy it loses the adapter without a word. So the wrapper that peft makes for an int8 layer is turned into a subclass of
itself that shows peft a float layer to merge into, quantizes the result, and keeps the codes it replaces. PyTorch says
when such a wrapper is made (`register_module_module_registration_hook`); every route of merging, of diffusers and of
peft, then goes through it, and so do adapters other than LoRA.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import new_class
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from qvd_core.errors import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_core.requantize import float_layer, requantize, restore, skeleton

# Those whose forward pass adds to the output of the layer, whatever its weight is; others read the weight.
SUPPORTED_TUNERS = ("lora", "loha", "lokr")
WEIGHT_FREE_STARTS = ("gaussian", "eva")  # of `init_lora_weights`, beside True and False

FUSE_WARNING = (
    "Merging an adapter into int8 weights rounds them again, which loses some precision, most below 8 bits: leave the "
    "adapter unmerged, or merge it before quantizing, where every bit counts. Unmerging brings the old weights back."
)


class MergesByRequantizing:
    """What is put before a tuner layer of peft whose base layer is a `QuantizedLayer`."""

    base_layer: nn.Module
    merged_adapters: list[str]
    _replaced: dict[str, Tensor] | None = None  # the base layer's tensors before the first merge, on the CPU

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: as peft does for a float layer of this shape. Raises QVDError for what needs the weight."""
        start = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights", True))
        if isinstance(start, str) and start not in WEIGHT_FREE_STARTS:
            raise QVDError(
                f"init_lora_weights={start!r} splits the float weight of a layer, and this one is int8: "
                "use the default, or start the adapter on the full-precision model."
            )
        layer = _quantized(self)
        if hasattr(self, "_kernel_dim"):
            self._kernel_dim = len(layer.weight_shape)  # 4-bit codes are packed into two dimensions
        with _showing(self, skeleton(layer)):
            super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        if getattr(self, "use_dora", {}).get(adapter_name):  # of a peft that has no variants yet
            raise _more_than_lora("Dora")

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Plain LoRA only: DoRA and its like compute with the weight. Raises QVDError for them."""
        variant = super().resolve_lora_variant(**kwargs)  # type: ignore[misc]
        if variant is not None:
            raise _more_than_lora(type(variant).__name__.removesuffix("Variant"))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as peft does, into the float layer, and quantize it again. Raises QVDError when that is impossible."""
        layer = _quantized(self)
        before = list(self.merged_adapters)
        changed = float_layer(layer)
        try:
            with _showing(self, changed):
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            if self.merged_adapters == before:
                return
            replaced = requantize(layer, changed)
        except BaseException:
            self.merged_adapters[:] = before
            raise
        if not before:
            self._replaced = replaced
        warnings.warn(FUSE_WARNING, stacklevel=2)

    def unmerge(self) -> None:
        """Bring the codes from before the first merge back, bit for bit."""
        if self._replaced is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        restore(_quantized(self), self._replaced)
        self._replaced = None
        self.merged_adapters.clear()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: the class is made at run time, and found by the one it was made of."""
        return _blank, (type(self).__mro__[2],), self.__dict__


@cache
def _merging_by_requantizing(tuner: Any) -> Any:
    """The subclass of a tuner layer's class; it bears the same name."""
    return new_class(
        tuner.__name__, (MergesByRequantizing, tuner), exec_body=lambda body: body.update(__module__=tuner.__module__)
    )


def _blank(tuner: Any) -> Any:
    made = _merging_by_requantizing(tuner)
    return made.__new__(made)


def _more_than_lora(name: str) -> QVDError:
    return QVDError(
        f"this adapter ({name}) is more than a plain LoRA and needs the float weight of the layer it is on: "
        "merge it into the full-precision model, then quantize that."
    )


def _quantized(tuner: Any) -> QuantizedLayer:
    """The int8 layer a tuner layer wraps. Raises QVDError when there is another tuner layer between them."""
    if not isinstance(tuner.base_layer, QuantizedLayer):
        raise QVDError("this int8 layer has an adapter of another kind already: unload it first.")
    return tuner.base_layer


@contextmanager
def _showing(tuner: Any, stand_in: nn.Module) -> Iterator[None]:
    """Let peft see another base layer for a while."""
    layer = tuner.base_layer
    tuner._modules["base_layer"] = stand_in
    try:
        yield
    finally:
        tuner._modules["base_layer"] = layer


def _adapt(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Called by PyTorch for every module that becomes part of another one."""
    if name != "base_layer" or not isinstance(submodule, QuantizedLayer | MergesByRequantizing):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuner: Any = type(module)
    if not isinstance(module, BaseTunerLayer) or isinstance(module, MergesByRequantizing):
        return
    kind = tuner.__module__.removeprefix("peft.tuners.").partition(".")[0]
    if kind not in SUPPORTED_TUNERS or not issubclass(tuner, nn.Module) or tuner.__name__ == "ParamWrapper":
        raise QVDError(
            f"peft's {kind} {tuner.__name__} computes with the float weight of the layer it is on, and this one is "
            f"int8: use {', '.join(SUPPORTED_TUNERS)}, or the full-precision model."
        )
    module.__class__ = _merging_by_requantizing(tuner)


_watching = False


def watch_adapters() -> None:
    """Let adapters of peft merge into int8 layers from now on. Calling it again changes nothing."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_adapt)
        _watching = True
