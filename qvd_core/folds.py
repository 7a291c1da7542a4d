"""Producer folds: move SCRI's shift and scale into what computes a layer's input. METHOD section 3, the table [R], [O].

A layer that is quantized with x~ = (x - z) / s needs no work at run time when the module before it hands out x~
instead of x. Where that is exact is data (`Fold`); here it becomes edits of named tensors, so that a loader can apply
each one as its tensor arrives, in any order and without the rest of the model. The consumers' own side,
W~ = W diag(s) and b~ = b + W z, is the same with and without a producer fold (`weights.fold_transform`).

One tensor may be touched from both sides: `to_v` reads a folded norm and is itself folded for `to_out`. With D = 1/s of
its outputs, D W diag(s') and D (b + W z' - z) come out of either order: the edits commute with the layer's own fold.
Edit first all the same: the own fold of a layer without bias gives it one, which the edit has then not seen.

An edit holds for the model as it is: adapters that add a branch to an attention or a layer (LoRA, IP-Adapter) must be
merged or loaded before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.families import Family, Fold
from qvd_core.families.patterns import matches
from qvd_core.layer_kinds import layer_kind
from qvd_core.transform import Transform


@dataclass(frozen=True)
class RowEdit:
    """rows[start:stop] <- (rows + offset - shift) / scale - offset; shift, scale float32 [stop - start] or None."""

    start: int
    stop: int
    shift: Tensor | None
    scale: Tensor | None
    offset: float = 0.0


@dataclass(frozen=True)
class TensorEdit:
    """What folds do to one tensor of a model.

    name: its state-dict name. shape: the shape it must have. rows: how many rows it is seen as, [rows, the rest].
    parts: edits of disjoint row ranges.
    """

    name: str
    shape: torch.Size
    rows: int
    parts: tuple[RowEdit, ...]

    def apply(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An edited copy, computed in float32 or better, in `dtype` (default: the tensor's own), on its device.

        A tensor that is quantized next is best handed on with `dtype=torch.float32`, unrounded.
        Raises QVDError when the tensor has another shape, or when a finite value leaves the range of `dtype`.
        """
        if tensor.shape != self.shape:
            raise QVDError(
                f"{self.name} is {list(tensor.shape)}, its fold was made for {list(self.shape)}: "
                "the weights belong to another model than the one that was planned."
            )
        edited = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        rows = edited.view(self.rows, -1)
        for part in self.parts:
            target = rows[part.start : part.stop]
            if part.shift is not None:
                target -= part.shift.to(target).unsqueeze(1)
            if part.scale is not None:
                target += part.offset
                target /= part.scale.to(target).unsqueeze(1)
                target -= part.offset
        result = edited.to(dtype or tensor.dtype)
        if bool((torch.isfinite(tensor) & ~torch.isfinite(result)).any()):
            raise QVDError(
                f"folding shift and scale into {self.name} leaves the range of {result.dtype}: load the model in "
                "bfloat16 or float32, or fold nothing into producers (portable=False)."
            )
        return result


@dataclass(frozen=True)
class _Slot:
    """Rows of one tensor that a fold may edit, one per channel, and which parts of the transform they take."""

    tensor: str
    shape: torch.Size
    rows: int
    start: int
    channels: int
    takes_shift: bool
    takes_scale: bool
    offset: float = 0.0

    def edit(self, shift: Tensor | None, scale: Tensor | None) -> RowEdit | None:
        shift, scale = shift if self.takes_shift else None, scale if self.takes_scale else None
        if shift is None and scale is None:
            return None
        return RowEdit(self.start, self.start + self.channels, shift, scale, self.offset)


@dataclass(frozen=True)
class FoldSite:
    """One fold in one model: its consumers must share one transform, of which this much can move into the producer.

    consumers: names of the layers that read the input. shift, scale: what can be folded. channels: how many of the
    input's `inputs` channels, counted from the first, the producer gives.
    """

    fold: Fold
    parent: str
    consumers: tuple[str, ...]
    shift: bool
    scale: bool
    channels: int
    inputs: int
    slots: tuple[_Slot, ...]

    def restrict(self, transform: Transform) -> Transform:
        """The part of a transform that folds here completely: the rest is dropped, not left over."""
        shift, scale = torch.zeros_like(transform.shift), torch.ones_like(transform.scale)
        if self.shift:
            shift[: self.channels] = transform.shift[: self.channels]
        if self.scale:
            scale[: self.channels] = transform.scale[: self.channels]
        return replace(transform, shift=shift, scale=scale, rotation=0)


def fold_sites(model: nn.Module, family: Family) -> list[FoldSite]:
    """Every place in a float model where a producer can take something of its consumers' transform.

    Needs only the skeleton: tensors may be on the meta device. METHOD section 3 [R], "modulation" [O].
    """
    modules = dict(model.named_modules())
    sites = [_site(modules, fold, name) for name in modules for fold in family.folds if matches(name, (fold.parent,))]
    return [site for site in sites if site is not None]


def foldable_transforms(model: nn.Module, family: Family, transforms: Mapping[str, Transform]) -> dict[str, Transform]:
    """As much of the transforms as folds without a remainder, for exactly the layers whose input has a producer.

    What cannot be folded (the shift before a gate, the scale behind a table, a rotation) is dropped; layers of a site
    whose consumers want different transforms are left out. `producer_edits` of the result leaves nothing over.
    Raises QVDError when a transform does not fit its layer.
    """
    result: dict[str, Transform] = {}
    for site in fold_sites(model, family):
        transform = _common_transform(site, transforms)
        if transform is not None:
            result.update(dict.fromkeys(site.consumers, site.restrict(transform)))
    return result


def producer_edits(
    model: nn.Module, family: Family, transforms: Mapping[str, Transform]
) -> tuple[dict[str, TensorEdit], dict[str, Transform]]:
    """Fold the transforms of layers' inputs into their producers, as far as that is exact.

    `model` is the float model (meta tensors do); `transforms` holds one Transform [K] per layer. Returns the edits by
    tensor name, none of which depends on another, and for every layer of `transforms` what must still be done to its
    input at run time: the identity where all was folded, the layer's own transform where nothing was; a rotation, which
    comes after shift and scale, always stays. A site is folded only when all its consumers are in `transforms` with
    equal values: `fold_sites` says who they are.
    Raises QVDError when a transform does not fit its layer.
    """
    parts: dict[str, list[RowEdit]] = {}
    slots: dict[str, _Slot] = {}
    remainders = dict(transforms)
    for site in fold_sites(model, family):
        transform = _common_transform(site, transforms)
        if transform is None:
            continue
        folded = site.restrict(transform)
        shift = folded.shift[: site.channels] if bool((folded.shift != 0).any()) else None
        scale = folded.scale[: site.channels] if bool((folded.scale != 1).any()) else None
        for slot in site.slots:
            edit = slot.edit(shift, scale)
            if edit is not None:
                parts.setdefault(slot.tensor, []).append(edit)
                slots[slot.tensor] = slot
        for consumer in site.consumers:
            remainders[consumer] = _remainder(transform, folded)
    edits = {
        name: TensorEdit(name, slots[name].shape, slots[name].rows, _disjoint(name, found))
        for name, found in parts.items()
    }
    return edits, remainders


def _remainder(transform: Transform, folded: Transform) -> Transform:
    """What turns the folded input (x - z') / s' into (x - z) / s."""
    shift = (transform.shift.double() - folded.shift.double()) / folded.scale.double()
    scale = transform.scale.double() / folded.scale.double()
    return replace(transform, shift=shift.float(), scale=scale.float())


def _common_transform(site: FoldSite, transforms: Mapping[str, Transform]) -> Transform | None:
    """The transform of all consumers; None where one has none or another one."""
    found = [transforms.get(consumer) for consumer in site.consumers]
    first = found[0]
    if first is None:
        return None
    for consumer, transform in zip(site.consumers, found, strict=True):
        if transform is None:
            return None
        if transform.shift.shape != (site.inputs,) or transform.scale.shape != (site.inputs,):
            raise QVDError(
                f"the transform of layer {consumer} has {len(transform.shift)} channels, its input has {site.inputs}: "
                "the scales belong to another model."
            )
        if not transform.same(first):
            return None
    return first


def _disjoint(name: str, parts: Sequence[RowEdit]) -> tuple[RowEdit, ...]:
    """The parts in order of their rows; two folds of the same rows are a wrong registry entry."""
    ordered = tuple(sorted(parts, key=lambda part: part.start))
    if any(before.stop > after.start for before, after in pairwise(ordered)):
        raise QVDError(f"two folds want the same rows of {name}: the family's entry is wrong, please report it.")
    return ordered


def _site(modules: Mapping[str, nn.Module], fold: Fold, parent: str) -> FoldSite | None:
    """The fold below one parent; None where the model lacks a producer, or has nothing that could take anything."""

    def full(name: str) -> str:
        return f"{parent}.{name}" if parent else name

    consumers = {full(name): modules[full(name)] for name in fold.consumers if full(name) in modules}
    widths = {_inputs(module) for module in consumers.values()}
    inputs = widths.pop() if len(widths) == 1 else None
    if inputs is None:
        return None
    slots: list[_Slot] = []
    shift = scale = True
    for name in (*fold.producers, *(name for name in fold.addends if full(name) in modules)):
        found = _slots(modules, fold, full(name), inputs, name in fold.addends)
        shift = shift and (name in fold.addends or any(slot.takes_shift for slot in found))
        scale = scale and fold.scale and any(slot.takes_scale for slot in found)
        slots += found
    # A border of zeros stays zero whatever the producer does, so that a shifted convolution is wrong there.
    shift = shift and not any(map(_pads, consumers.values()))
    if not (shift or scale) or len({slot.channels for slot in slots}) != 1:
        return None
    channels = slots[0].channels
    if channels != inputs and not (fold.leading and channels < inputs):
        return None  # for example fewer value heads than query heads
    return FoldSite(fold, parent, tuple(consumers), shift, scale, channels, inputs, tuple(slots))


def _slots(modules: Mapping[str, nn.Module], fold: Fold, producer: str, inputs: int, addend: bool) -> list[_Slot]:
    if fold.kind == "table":
        return _table_slots(modules, fold, producer, inputs)
    module = modules.get(producer)
    if fold.kind == "norm":
        return _norm_slots(module, producer)
    if not isinstance(module, nn.Linear) or layer_kind(module) is None:  # a wrapper may compute something else
        return []
    if fold.kind == "value":
        return _row_slots(module, producer, 0, module.out_features, takes_shift=not addend)
    if fold.kind == "gate":
        return _row_slots(module, producer, 0, module.out_features // 2, takes_shift=False)
    return _modulation_slots(module, producer, fold, inputs)


def _norm_slots(module: nn.Module | None, name: str) -> list[_Slot]:
    """gamma / s; (beta - z) / s. A norm without affine parameters takes nothing."""
    slots = []
    for key in ("weight", "bias"):
        tensor = getattr(module, key, None)
        if isinstance(tensor, Tensor) and tensor.dim() == 1:
            slots.append(_Slot(f"{name}.{key}", tensor.shape, len(tensor), 0, len(tensor), key == "bias", True))
    return slots if slots and slots[0].tensor.endswith(".weight") else []


def _row_slots(
    module: nn.Linear, name: str, start: int, channels: int, takes_shift: bool, offset: float = 0.0
) -> list[_Slot]:
    """Rows start .. start + channels of a linear's weight and bias; the shift needs a bias to be taken off."""
    rows = module.out_features
    slots = [_Slot(f"{name}.weight", module.weight.shape, rows, start, channels, False, True)]
    if module.bias is not None:
        slots.append(_Slot(f"{name}.bias", module.bias.shape, rows, start, channels, takes_shift, True, offset))
    return slots


def _modulation_slots(module: nn.Linear, name: str, fold: Fold, channels: int) -> list[_Slot]:
    slots: list[_Slot] = []
    if module.bias is None or module.out_features % channels:
        return slots  # 1 + scale cannot be divided without a bias
    for shift_row, scale_row in fold.sections:
        if shift_row is not None:
            slots += _row_slots(module, name, shift_row * channels, channels, takes_shift=True)
        if scale_row is not None:
            slots += _row_slots(module, name, scale_row * channels, channels, takes_shift=False, offset=1.0)
    return slots


def _table_slots(modules: Mapping[str, nn.Module], fold: Fold, name: str, channels: int) -> list[_Slot]:
    parent, _, key = name.rpartition(".")
    table = getattr(modules[parent], key, None)
    if not isinstance(table, Tensor) or table.shape[-1] != channels:
        return []
    return [
        _Slot(name, table.shape, table.numel(), row * channels, channels, takes_shift=True, takes_scale=False)
        for row, _ in fold.sections
        if row is not None
    ]


def _inputs(module: nn.Module) -> int | None:
    """Input channels of a layer that can be quantized; None for anything else."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.in_channels if module.groups == 1 and layer_kind(module) is not None else None
    return module.in_features if isinstance(module, nn.Linear) and layer_kind(module) is not None else None


def _pads(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d) and any(module._reversed_padding_repeated_twice)
