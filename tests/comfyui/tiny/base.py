"""What the tiny models of ComfyUI's classes have in common. Nothing here needs ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH, FRAMES, TEXT, TOKENS = 2, 3, 32, 5


@dataclass(frozen=True)
class TinyModel:
    """A model that no test may change, latents for it, and how to call it (or a copy) on latents at a timestep.

    other_timesteps: those that the model embeds beside the one it is called with.
    """

    model: nn.Module
    latents: Tensor
    call: Callable[[nn.Module, Tensor, float], Tensor]
    other_timesteps: tuple[float, ...] = ()

    def forward(self, model: nn.Module, timestep: float = 500.0) -> Tensor:
        return self.call(model, self.latents.clone(), timestep)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timesteps(timestep: float) -> Tensor:
    """[BATCH], all the same."""
    return torch.full((BATCH,), float(timestep))


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter random, norms near 1: ComfyUI leaves them as they were in memory."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight") and parameter.dim() == 1:
            parameter.data = 1.0 + 0.3 * noise
        elif name.endswith("weight"):
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise
    return model.eval().requires_grad_(False)
