"""Tiny denoisers, random adapters for them, and how close two outputs are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core import QuantSpec, Scales, calibrate_model, quantize_model
from qvd_core.layers import QuantizedLayer
from tests.diffusers.tiny import tiny_animate_diff, tiny_wan_transformer

WAN_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "time_proj")
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj")


TOKEN = QuantSpec(temporal_quantizer="power")  # one quantizer: the search takes its time
STATIC = QuantSpec(activation="static", scale="smooth", temporal_quantizer="power")
BUCKETS = QuantSpec(activation="static_bucket", scale="smooth", temporal_quantizer="power")
FOUR_BITS = QuantSpec(weight_bits=4, rounding="nearest", temporal_quantizer="power")


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A frozen full-precision model that no test may change, how to call it, and where adapters go."""

    model: Any
    call: Callable[[Any, float], Tensor]
    targets: tuple[str, ...]
    prefix: str  # of its keys in a LoRA file

    @torch.no_grad()
    def run(self, model: nn.Module, timestep: float = 500.0) -> Tensor:
        return self.call(model, timestep)

    def copy(self) -> Any:
        return copy.deepcopy(self.model)

    def quantized(self, spec: QuantSpec = TOKEN) -> Any:
        """A quantized copy of the model; calibrated where the settings need it."""
        return copy.deepcopy(_quantized(self, spec))

    def adapter(
        self, seed: int = 0, rank: int = 4, targets: tuple[str, ...] = (), strength: float = 0.3
    ) -> dict[str, Tensor]:
        """A random LoRA as its file holds it; of strength 0.3 it changes the output by about half."""
        return _adapter(self, seed, rank, targets or self.targets, strength)

    def load(self, model: Any, weights: dict[str, Tensor], name: str = "first", **how: Any) -> Any:
        """The model, with an adapter."""
        own = {key: value.clone() for key, value in weights.items()}  # hot-swapping trades tensors in older pefts
        model.load_lora_adapter(own, prefix=self.prefix, adapter_name=name, **how)
        return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def wan() -> Denoiser:
    """Linears, and one temporal projection."""

    def call(model: Any, timestep: float) -> Tensor:
        dtype = model.patch_embedding.weight.dtype
        latents, text = noise(2, 4, 3, 8, 8).to(dtype), noise(2, 6, 32, seed=2).to(dtype)
        return model(latents, torch.full((2,), timestep), text).sample

    return Denoiser(tiny_wan_transformer().eval().requires_grad_(False), call, WAN_TARGETS, "transformer")


@cache
def unet() -> Denoiser:
    """AnimateDiff's UNet: convolutions, spatial and motion attention."""

    def call(model: Any, timestep: float) -> Tensor:
        return model(noise(1, 4, 2, 8, 8), torch.tensor(int(timestep)), noise(2, 6, 32, seed=2)).sample

    return Denoiser(tiny_animate_diff().unet.eval().requires_grad_(False), call, UNET_TARGETS, "unet")


DENOISERS = {"wan": wan, "unet": unet}


@cache
def _adapter(denoiser: Denoiser, seed: int, rank: int, targets: tuple[str, ...], strength: float) -> dict[str, Tensor]:
    model = denoiser.copy()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    torch.manual_seed(seed)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=strength)
    state = get_peft_model_state_dict(model)
    return {f"{denoiser.prefix}.{key}": value.detach().clone() for key, value in state.items()}


@cache
def _quantized(denoiser: Denoiser, spec: QuantSpec) -> Any:
    return quantize_model(denoiser.copy(), spec, scales(denoiser, spec) if spec.is_static else None)


@cache
def scales(denoiser: Denoiser, spec: QuantSpec) -> Scales:
    """Calibrated scales."""
    model = denoiser.copy()
    return calibrate_model(model, lambda: [denoiser.run(model, timestep) for timestep in (900.0, 500.0, 100.0)], spec)


def cosine(first: Tensor, second: Tensor) -> float:
    return float(F.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


def sqnr_db(out: Tensor, expected: Tensor) -> float:
    noise = (out.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the quantized layers, by the layers' names without adapters."""
    return {
        f"{name.removesuffix('.base_layer')}.{key}": value.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        for key, value in layer.state_dict().items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
