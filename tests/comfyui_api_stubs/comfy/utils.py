"""Nested attributes, files, the progress bar."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

ATTR_UNSET: dict[str, Any] = {}
PROGRESS_BAR_HOOK: Callable[..., None] | None = None


def get_attr(obj: Any, attr: str) -> Any:
    """The attribute "a.b.c" of an object."""
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj


def set_attr(obj: Any, attr: str, value: Any) -> Any:
    """Set the attribute "a.b.c"; returns what it was before."""
    parent, _, name = attr.rpartition(".")
    owner = get_attr(obj, parent) if parent else obj
    before = getattr(owner, name, ATTR_UNSET)
    if value is ATTR_UNSET:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
    return before


def set_attr_param(obj: Any, attr: str, value: Tensor) -> Any:
    """Set a parameter; a tensor of the inference mode is copied first where that mode is off."""
    if value.is_inference() and not torch.is_inference_mode_enabled():
        value = value.clone()
    return set_attr(obj, attr, nn.Parameter(value, requires_grad=False))


def load_torch_file(
    ckpt: str, safe_load: bool = False, device: torch.device | None = None, return_metadata: bool = False
) -> Any:
    """The tensors of a safetensors file, with its metadata where asked for. ComfyUI reads other formats, too."""
    with safe_open(ckpt, framework="pt", device=str(device or "cpu")) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return (tensors, file.metadata()) if return_metadata else tensors


def state_dict_prefix_replace(
    state_dict: dict[str, Any], replace_prefix: Mapping[str, str], filter_keys: bool = False
) -> dict[str, Any]:
    """Rename what starts with a prefix; filter_keys: give back only that, else change `state_dict` itself."""
    out: dict[str, Any] = {} if filter_keys else state_dict
    for old, new in replace_prefix.items():
        for name in [name for name in state_dict if name.startswith(old)]:
            out[new + name.removeprefix(old)] = state_dict.pop(name)
    return out


def string_to_seed(data: str) -> int:
    """A number of 32 bits that depends on the text alone; ComfyUI's is another one."""
    return zlib.crc32(data.encode())


def deepcopy_list_dict(obj: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of nested lists and dicts, with the same leaves."""
    if isinstance(obj, dict):
        return {key: deepcopy_list_dict(value, memo) for key, value in obj.items()}
    if isinstance(obj, list):
        return [deepcopy_list_dict(value, memo) for value in obj]
    return obj


def set_progress_bar_global_hook(function: Callable[..., None] | None) -> None:
    """Who is told of every progress bar made from now on: function(value, total, preview, node_id=...)."""
    global PROGRESS_BAR_HOOK
    PROGRESS_BAR_HOOK = function


class ProgressBar:
    """Tells the hook of every change; ComfyUI leaves some out."""

    def __init__(self, total: int, node_id: str | None = None):
        self.total = total
        self.current = 0
        self.node_id = node_id
        self.hook = PROGRESS_BAR_HOOK

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = self.total if total is None else total
        self.current = min(value, self.total)
        if self.hook is not None:
            self.hook(self.current, self.total, preview, node_id=self.node_id)

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)
