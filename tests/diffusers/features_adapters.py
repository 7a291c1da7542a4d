"""Features around adapters, training and copies."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from tests.diffusers.features import Judge, feature
from tests.diffusers.tiny_pipelines import TinyPipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, STRENGTH = 4, 0.1
PREFIX = "denoiser"
LEARNING_RATE = 1e-2

Weights = dict[str, Tensor]


def adapter(model: Any, seed: int) -> Weights:
    """A random LoRA for a model, as its file would hold it; the same for the full-precision and the quantized model."""
    maker = copy.deepcopy(model)
    maker.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(maker)
    return {
        f"{PREFIX}.{name}": torch.randn(state[name].shape, generator=generator) * STRENGTH for name in sorted(state)
    }


def load(model: Any, seed: int = 0, name: str = "first", **how: Any) -> None:
    model.load_lora_adapter(adapter(model, seed), prefix=PREFIX, adapter_name=name, **how)


def unload(kind: TinyPipeline, pipe: Any) -> None:
    kind.model(pipe).unload_lora()


NEEDS_LORA = ("denoiser.load_lora_adapter",)


@feature("LoRA", undo=unload, needs=NEEDS_LORA, judge=Judge.APPROXIMATION)
def one_adapter(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    load(kind.model(pipe))


@feature("two LoRAs with weights", undo=unload, needs=NEEDS_LORA, judge=Judge.APPROXIMATION)
def two_adapters(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    model = kind.model(pipe)
    load(model)
    load(model, 1, "second")
    model.set_adapters(["first", "second"], [0.7, 0.4])


@feature("LoRA switched off", needs=NEEDS_LORA)
def adapter_off(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    load(kind.model(pipe))
    kind.model(pipe).disable_adapters()


@feature("LoRA hot-swapped for another", undo=unload, needs=NEEDS_LORA, judge=Judge.APPROXIMATION)
def swapped_adapter(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    model = kind.model(pipe)
    load(model)
    kind.sample(pipe, output_type="latent")
    load(model, 1, hotswap=True)


def unfuse(kind: TinyPipeline, pipe: Any) -> None:
    kind.model(pipe).unfuse_lora()
    unload(kind, pipe)


@feature("LoRA fused, unfused", undo=unfuse, needs=NEEDS_LORA, judge=Judge.APPROXIMATION, unchanged=False)
def fused_adapter(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    load(kind.model(pipe))
    kind.model(pipe).fuse_lora()


@feature("LoRA trained, with gradient checkpointing", undo=unload, needs=NEEDS_LORA, judge=Judge.APPROXIMATION)
def trained_adapter(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    model = kind.model(pipe)
    args, kwargs = one_call(kind, pipe)
    model.requires_grad_(False)
    load(model)
    trained = [parameter.requires_grad_(True) for name, parameter in model.named_parameters() if "lora_" in name]
    model.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    losses = []
    with torch.enable_grad():
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(*args, **kwargs)[0].square().mean().log()  # of any model's own scale
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    model.disable_gradient_checkpointing()
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss went from {losses[0]} to {losses[-1]}")


def one_call(kind: TinyPipeline, pipe: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call of the denoiser while it samples."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = kind.model(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    kind.sample(pipe, output_type="latent")
    handle.remove()
    args, kwargs = copy.deepcopy(seen[0])
    return args, {**kwargs, "return_dict": False}


def exchange(kind: TinyPipeline, pipe: Any, model: Any) -> None:
    pipe.register_modules(**{kind.denoiser: model})


@feature("copy.deepcopy of the denoiser")
def copied(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    exchange(kind, pipe, copy.deepcopy(kind.model(pipe)))


@feature("pickle of the denoiser")
def pickled(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    exchange(kind, pipe, pickle.loads(pickle.dumps(kind.model(pipe))))  # noqa: S301 - made by this very line


@feature("state_dict of the denoiser, through torch.save")
def state_saved(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    file = io.BytesIO()
    torch.save(kind.model(pipe).state_dict(), file)
    file.seek(0)
    kind.model(pipe).load_state_dict(torch.load(file, weights_only=True))
