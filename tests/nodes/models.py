"""Tiny denoisers of ComfyUI's make with random weights, as MODELs; and what to sample them with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from comfy import latent_formats, model_base, supported_models_base
from comfy.model_patcher import ModelPatcher
from comfy.sample import fix_empty_latent_channels, prepare_noise
from comfy.sample import sample as comfy_sample
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, WIDTH, TEXT, TIME = 4, 32, 24, 16
CPU = torch.device("cpu")


def _sinusoid(timestep: Tensor, channels: int) -> Tensor:
    half = channels // 2
    angles = timestep.float()[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Attention(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (make(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context)))


class _Block(nn.Module):
    def __init__(self, make: Any, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, WIDTH, **kwargs))
        self.norm1 = operations.LayerNorm(WIDTH, elementwise_affine=False, **kwargs)
        self.self_attn = _Attention(make)
        self.norm3 = operations.LayerNorm(WIDTH, **kwargs)
        self.cross_attn = _Attention(make)
        self.norm2 = operations.LayerNorm(WIDTH, elementwise_affine=False, **kwargs)
        self.ffn = nn.Sequential(make(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), make(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.to(time) + time).chunk(6, dim=1)
        hidden = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(hidden, hidden)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class _Head(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.head = make(WIDTH, 4 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class WanModel(nn.Module):
    """Wan's module names, so that its family knows them; latents [batch, channels, frames, height, width]."""

    def __init__(
        self, layers: int = 2, dtype: torch.dtype | None = None, device: Any = None, operations: Any = None
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.dtype = dtype

        def make(inputs: int, outputs: int) -> nn.Module:
            return operations.Linear(inputs, outputs, **kwargs)

        self.patch_embedding = operations.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2), **kwargs)
        self.text_embedding = nn.Sequential(make(TEXT, WIDTH), nn.GELU(approximate="tanh"), make(WIDTH, WIDTH))
        self.time_embedding = nn.Sequential(make(TIME, WIDTH), nn.SiLU(), make(WIDTH, WIDTH))
        self.time_projection = nn.Sequential(nn.SiLU(), make(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(_Block(make, operations, **kwargs) for _ in range(layers))
        self.head = _Head(make)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
        **kwargs: Any,
    ) -> Tensor:
        batch, _, frames, height, width = x.shape
        time = self.time_projection(self.time_embedding(_sinusoid(timestep, TIME).to(x))).unflatten(1, (6, WIDTH))
        context = self.text_embedding(context)
        hidden = self.patch_embedding(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden, time, context)
        patches = self.head(hidden).view(batch, frames, height // 2, width // 2, 2, 2, CHANNELS)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)


class ConvolutionDenoiser(nn.Module):
    """Convolutions over time and space between two that the generic rule keeps; it has no family."""

    def __init__(self, dtype: torch.dtype | None = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.dtype = dtype
        self.conv_in = operations.Conv3d(CHANNELS, 64, 1, **kwargs)
        self.over_time = operations.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0), **kwargs)
        self.in_space = operations.Conv2d(64, 64, 3, padding=1, **kwargs)
        self.mix = operations.Linear(64, 64, **kwargs)
        self.conv_out = operations.Conv3d(64, CHANNELS, 1, **kwargs)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
        **kwargs: Any,
    ) -> Tensor:
        hidden = self.conv_in(x)
        hidden = hidden + self.over_time(F.silu(hidden))
        frames = F.silu(hidden).transpose(1, 2)
        hidden = hidden + self.in_space(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)
        hidden = hidden + self.mix(hidden.movedim(1, -1)).movedim(-1, 1)
        return self.conv_out(hidden)


class VideoFormat(latent_formats.LatentFormat):
    latent_channels = CHANNELS
    latent_dimensions = 3
    latent_rgb_factors = [[0.1, 0.2, 0.3]] * CHANNELS


class WanConfig(supported_models_base.BASE):
    required_keys = {"{}blocks.1.self_attn.q.weight": None}  # noqa: RUF012 - as in ComfyUI
    latent_format = VideoFormat
    denoiser = WanModel

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> model_base.BaseModel:
        return model_base.BaseModel(self, device=device, unet_model=type(self).denoiser)


class OneBlockConfig(WanConfig):
    required_keys = {"{}blocks.0.self_attn.q.weight": None}  # noqa: RUF012 - as in ComfyUI
    unet_config = {"layers": 1}  # noqa: RUF012 - as in ComfyUI


class ConvolutionsConfig(WanConfig):
    required_keys = {"{}over_time.weight": None}  # noqa: RUF012 - as in ComfyUI
    denoiser = ConvolutionDenoiser


@cache
def _weights(config: type[WanConfig], seed: int) -> dict[str, Tensor]:
    """Every parameter random, norms near 1. Shared: each MODEL gets a copy."""
    made = config(config.unet_config).get_model({})
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in made.diffusion_model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("weight") and tensor.dim() > 1:
            state[name] = noise / tensor[0].numel() ** 0.5
        else:
            state[name] = (1.0 if "norm3.weight" in name else 0.0) + 0.3 * noise
    return state


def patcher(config: type[WanConfig], dtype: torch.dtype = torch.float32, seed: int = 0) -> ModelPatcher:
    """A float MODEL as a loader makes it."""
    made = config(config.unet_config)
    made.set_inference_dtype(dtype, None)
    model = made.get_model({})
    model.load_model_weights({name: tensor.to(dtype) for name, tensor in _weights(config, seed).items()})
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


def conditioning(seed: int, tokens: int = 5) -> list[Any]:
    return [[torch.randn(1, tokens, TEXT, generator=torch.Generator().manual_seed(seed)), {}]]


def latent(frames: int = 3) -> dict[str, Any]:
    return {"samples": torch.zeros(1, CHANNELS, frames, 4, 6)}


def sample(model: ModelPatcher, steps: int = 2, cfg: float = 3.0, seed: int = 1) -> Tensor:
    """The latents that KSampler would return."""
    empty = fix_empty_latent_channels(model, latent()["samples"])
    noise = prepare_noise(empty, seed)
    with torch.inference_mode():
        return comfy_sample(
            model, noise, steps, cfg, "euler", "simple", conditioning(2), conditioning(4), empty, seed=seed
        )


def denoise(model: ModelPatcher, timestep: float = 500.0) -> Tensor:
    """One call of the denoiser, as it is now: nothing is loaded."""
    x = torch.randn(2, CHANNELS, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return model.model.diffusion_model(x, torch.full((2,), timestep), conditioning(2)[0][0].expand(2, -1, -1))


def lora(model: ModelPatcher, layers: list[str], seed: int = 9, size: float = 0.3) -> dict[str, Any]:
    """A difference of rank one for each of these layers of the denoiser, as patches."""
    generator = torch.Generator().manual_seed(seed)
    patches = {}
    for name in layers:
        weight = model.model.diffusion_model.get_submodule(name).weight
        up, down = (
            torch.randn(weight.shape[0], 1, generator=generator),
            torch.randn(1, weight[0].numel(), generator=generator),
        )
        change = size * (up @ down).view(weight.shape) / weight[0].numel() ** 0.5
        patches[f"diffusion_model.{name}.weight"] = ("diff", (change,))
    return patches


def with_lora(model: ModelPatcher, layers: list[str], strength: float = 1.0, seed: int = 9) -> ModelPatcher:
    """What a LoRA loader gives back."""
    clone = model.clone()
    clone.add_patches(lora(model, layers, seed), strength)
    return clone


def snapshot(model: ModelPatcher) -> dict[str, Any]:
    """All that a node may not change of a MODEL it was given: its layers' classes, and every bit of its weights."""
    modules = {name: type(module) for name, module in model.model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.model.named_modules()}
    return {
        "modules": modules,
        "weights": weights,
        "hooks": hooks,
        "patches": {k: len(v) for k, v in model.patches.items()},
    }


def unchanged(model: ModelPatcher, before: dict[str, Any]) -> bool:
    now = snapshot(model)
    weights = before["weights"].keys() == now["weights"].keys() and all(
        torch.equal(tensor, now["weights"][name]) for name, tensor in before["weights"].items()
    )
    return weights and all(before[key] == now[key] for key in ("modules", "hooks", "patches"))


def sqnr_db(out: Tensor, expected: Tensor) -> float:
    noise = (out.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise.clamp(min=1e-300)))
