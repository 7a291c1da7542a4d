"""What the tiny random models have in common. Every parameter is random: nothing is trivially 0 or 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH, FRAMES, TEXT, TOKENS = 2, 3, 32, 5


@dataclass(frozen=True)
class TinyFamily:
    """A model that no test may change, latents for it, and how to call it (or a copy) on latents at a timestep."""

    model: nn.Module
    latents: Tensor
    call: Callable[[nn.Module, Tensor, float], Tensor]

    def forward(self, model: nn.Module, timestep: float = 500.0) -> Tensor:
        return self.call(model, self.latents, timestep)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timesteps(timestep: float) -> Tensor:
    """[BATCH], all the same."""
    return torch.full((BATCH,), float(timestep))


def randomized(model: nn.Module) -> nn.Module:
    """Norms, biases and tables away from 0 and 1, and no zero-initialised output."""
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
