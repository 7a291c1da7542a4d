"""Attention of a quantized model: its own, or a faster backend through diffusers' attention dispatcher.

int8 linears are about a third of a large video step, attention is most of the rest. `attention="auto"` lets
SageAttention (8-bit attention) run wherever it can, call by call; a named backend is set as diffusers sets it. Neither
changes a weight, so a model that asks for a backend this machine lacks still loads, with its own attention.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_diffusers.config import DENOISERS, QVDConfig, checked_attention
from qvd_diffusers.sampling import models_of

logger = logging.getLogger(__name__)

AUTO = "auto"
SAGE = attention_dispatch.AttentionBackendName.SAGE
SAGE_DEVICE = "cuda"
SAGE_DTYPES = (torch.float16, torch.bfloat16)
SAGE_CAPABILITY = (8, 0)
SAGE_HEAD_DIM = 128  # it pads smaller heads and refuses larger ones
MASKS = ("mask", "sparse")  # in the names of arguments that say which pairs attend; SageAttention takes all


@dataclass(frozen=True)
class AttentionChoice:
    """The attention backend "auto" settles on, None for the model's own, and the reason in one phrase."""

    backend: str | None
    reason: str


def set_attention(model_or_pipeline: Any, attention: str | None) -> None:
    """Choose the attention of a model, or of a pipeline's denoisers; quantized or not.

    attention: None for the model's own; "auto" for an installed SageAttention in every call it can take (CUDA, compute
        capability 8.0, 16 bits, no mask, no gradients), decided call by call, so that the model still runs anywhere; or
        the name of a diffusers attention backend. Unlike `model.set_attention_backend`, no other model is affected.
    Raises QVDError for an unknown name, a backend that diffusers refuses, and for something without attention layers.
    """
    attention = checked_attention(attention)
    models = [model_or_pipeline]
    if isinstance(model_or_pipeline, DiffusionPipeline):
        models = [model for name, model in models_of(model_or_pipeline).items() if name in DENOISERS]
    if not models or not all(hasattr(model, "set_attention_backend") for model in models):
        raise QVDError(
            f"{type(model_or_pipeline).__name__} has no attention to choose: give a diffusers model, or a pipeline "
            f"with a denoiser ({' or '.join(DENOISERS)})."
        )
    if attention is not None and attention != AUTO:
        require_backend(attention)
    for model in models:
        _reset(model)
        if attention is not None:
            apply_attention(model, attention)
        entry = model.config.get("quantization_config")
        if isinstance(entry, QVDConfig):
            entry.attention = attention  # what is saved from here on


def apply_attention(model: nn.Module, attention: str) -> None:
    """Switch the attention layers of one model, and say in one log line what became of "auto".

    Raises QVDError when diffusers refuses a named backend.
    """
    if attention == AUTO:
        _apply_auto(model)
    else:
        _apply_named(model, attention)


def restore_attention(model: nn.Module, attention: str) -> None:
    """Apply what a saved model asks for. Never raises and never downloads: the weights are right with any attention."""
    problem = recorded_problem(attention)
    if problem is None:
        try:
            apply_attention(model, attention)
        except QVDError as error:
            problem = str(error)
    if problem is not None:
        name = type(model).__name__
        logger.warning("%s was saved with attention=%r and keeps its own: %s", name, attention, problem)


def recorded_problem(attention: str) -> str | None:
    """Why an attention that was read from a checkpoint cannot be applied here; None: nothing speaks against it."""
    if attention == AUTO:
        return None
    if attention.endswith("_hub"):
        return "its kernels come from the Hub, which no checkpoint decides: call qvd_diffusers.set_attention."
    try:
        require_backend(checked_attention(attention))
    except QVDError as error:
        return str(error)
    return None


def require_backend(name: Any) -> None:
    """Raise QVDError when diffusers cannot run the named backend here. Downloads nothing."""
    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(name))
    except (ValueError, RuntimeError) as error:
        raise _refusal(name, error) from error


def automatic_attention(device: torch.device | str, dtype: torch.dtype | None = None) -> AttentionChoice:
    """What "auto" chooses for a model on `device` that computes in `dtype` (None: not known).

    A model that is still on the CPU is judged by the GPU it may move to: the layers look again at every call.
    """
    obstacle = _sage_obstacle(torch.device(device)) or _dtype_obstacle(dtype)
    if obstacle is not None:
        return AttentionChoice(None, obstacle)
    return AttentionChoice(SAGE.value, "SageAttention is installed, for every layer and call that it can take")


def _sage_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("sageattention") is None:
        return "sageattention is not installed"
    try:
        require_backend(SAGE)
    except QVDError:
        return "the installed sageattention cannot be imported or is older than this diffusers needs"
    if torch.version.hip or not torch.cuda.is_available():
        return "SageAttention needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    if capability < SAGE_CAPABILITY:
        return f"SageAttention needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def _dtype_obstacle(dtype: torch.dtype | None) -> str | None:
    if dtype is None or dtype in SAGE_DTYPES:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"SageAttention takes 16-bit tensors, the model computes in {name}: load it with torch_dtype=torch.bfloat16"


def _apply_auto(model: nn.Module) -> None:
    name = type(model).__name__
    choice = _choice_for(model)
    if choice.backend is None:
        logger.warning('%s keeps its own attention (attention="auto"): %s.', name, choice.reason)
        return
    told: set[str] = set()
    layers = [module for module in _attention_layers(model) if _takes_sage(module)]
    for module in layers:
        _switch_of(module, told).active = True
        _hand_over(module.processor, SAGE)  # now, or a compiled model would see it change at its first step
    logger.info('%s: SageAttention in %d attention layers (attention="auto").', name, len(layers))


def _choice_for(model: nn.Module) -> AttentionChoice:
    layers = list(_attention_layers(model))
    if not any(_takes_sage(module) for module in layers):
        return AttentionChoice(None, _unfit(layers))
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    if active != attention_dispatch.AttentionBackendName.NATIVE:
        name = getattr(active, "value", active)
        return AttentionChoice(None, f"diffusers is told to use {name!r} for every model of this process")
    parameter = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return automatic_attention(device, None if parameter is None else getattr(model, "dtype", parameter.dtype))


def _unfit(layers: list[nn.Module]) -> str:
    if not layers:
        return "it has no attention layers that diffusers knows"
    if any(_is_dispatched(module) for module in layers):
        return f"its attention layers have a backend already, or heads that are not known to fit ({SAGE_HEAD_DIM})"
    names = sorted({type(module.processor).__name__ for module in layers})
    return f"its attention ({', '.join(names)}) does not go through diffusers' dispatcher"


def _apply_named(model: nn.Module, name: str) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    try:
        model.set_attention_backend(name)  # type: ignore[operator]
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise _refusal(name, error) from error
    finally:
        # diffusers also makes it the default of every other model in the process.
        registry._active_backend = before
    layers = list(_attention_layers(model))
    if not any(_is_dispatched(module) for module in layers):
        logger.warning("%s keeps its own attention (attention=%r): %s.", type(model).__name__, name, _unfit(layers))


def _refusal(name: Any, error: Exception) -> QVDError:
    name = getattr(name, "value", name)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return QVDError(f'attention={name!r} cannot be used here: {reason}. Install it, or use attention="auto" or None.')


def _reset(model: nn.Module) -> None:
    """Every layer back to the attention it had when it was made."""
    for module in _attention_layers(model):
        switch = _find_switch(module)
        if switch is not None:
            switch.active = False
        vars(module.processor).pop("_attention_backend", None)  # what is left is the class's own
        vars(module.processor).pop(_OURS, None)


def _attention_layers(model: nn.Module) -> Iterator[Any]:
    """The modules that compute attention by a processor, as diffusers' models do."""
    return (module for module in model.modules() if callable(getattr(module, "processor", None)))


def _is_dispatched(module: Any) -> bool:
    return hasattr(module.processor, "_attention_backend")


def _takes_sage(module: Any) -> bool:
    """Whether a layer follows the dispatcher, has no backend of its own, and heads that SageAttention takes."""
    free = _is_dispatched(module) and module.processor._attention_backend is None
    head_dim = _head_dim(module)
    return free and head_dim is not None and head_dim <= SAGE_HEAD_DIM


def _head_dim(module: Any) -> int | None:
    """Channels per head; None when a layer does not say."""
    known = (getattr(module, name, None) for name in ("head_dim", "dim_head", "attention_head_dim"))
    stated = next((value for value in known if isinstance(value, int)), None)
    if stated is not None:
        return stated
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    query = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    inner = getattr(module, "inner_dim", None) or getattr(query, "out_features", None)
    return inner // heads if isinstance(heads, int) and isinstance(inner, int) else None


_OURS = "_qvd_attention"  # on a processor: the backend that a switch set last


def _hand_over(processor: Any, backend: Any) -> None:
    processor._attention_backend = backend
    setattr(processor, _OURS, backend)


@dataclass
class _SageSwitch:
    """Forward pre-hook of an attention layer: SageAttention for the calls it can take, else the layer's own.

    It looks at every call, because a model moves between devices, and masks and gradients come with the call. Whoever
    sets another backend on the layer afterwards has the last word.

    mask_positions: positional arguments of the layer that hold masks. told: reasons this model has given already.
    """

    mask_positions: tuple[int, ...]
    told: set[str]
    active: bool = True

    def __call__(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        processor = module.processor
        ours = getattr(processor, _OURS, None)
        self.active = self.active and getattr(processor, "_attention_backend", module) == ours
        if not self.active:
            return
        obstacle = self._obstacle(arguments, keywords)
        backend = SAGE if obstacle is None else None
        if backend != ours:
            _hand_over(processor, backend)
        if obstacle is not None and not torch.compiler.is_compiling() and obstacle not in self.told:
            self.told.add(obstacle)
            logger.warning("Attention runs without SageAttention where %s.", obstacle)

    def _obstacle(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str | None:
        tensor = arguments[0] if arguments else keywords.get("hidden_states")
        if not isinstance(tensor, Tensor) or tensor.device.type != SAGE_DEVICE:
            return f"tensors are not on a {SAGE_DEVICE} device"
        if tensor.dtype not in SAGE_DTYPES:
            return f"tensors are {str(tensor.dtype).removeprefix('torch.')}"
        if torch.is_grad_enabled():
            return "gradients are on: it has none; sample under torch.no_grad()"
        masks = [arguments[place] for place in self.mask_positions if place < len(arguments)]
        masks += [value for name, value in keywords.items() if _is_mask(name)]
        return "a mask is given" if any(mask is not None for mask in masks) else None


def _is_mask(name: str) -> bool:
    return any(part in name for part in MASKS)


def _find_switch(module: nn.Module) -> _SageSwitch | None:
    """The switch of a layer, its copy's own in a copied model."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, _SageSwitch)), None)


def _switch_of(module: nn.Module, told: set[str]) -> _SageSwitch:
    switch = _find_switch(module)
    if switch is None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        switch = _SageSwitch(tuple(place for place, name in enumerate(names) if _is_mask(name)), told)
        module.register_forward_pre_hook(switch, with_kwargs=True)
    switch.told = told
    return switch
