"""From steps to sigmas to timesteps, for flow models; the kind of model and its schedule are one class here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ModelSamplingDiscreteFlow(nn.Module):
    """sigma runs from 1 to 0, a timestep is `multiplier` times as much; ComfyUI mixes the arithmetic in as `CONST`."""

    sigmas: Tensor

    def __init__(self, model_config: Any = None):
        super().__init__()
        settings = {} if model_config is None else model_config.sampling_settings
        self.set_parameters(shift=settings.get("shift", 1.0), multiplier=settings.get("multiplier", 1000))

    def set_parameters(self, shift: float = 1.0, timesteps: int = 1000, multiplier: int = 1000) -> None:
        self.shift = shift
        self.multiplier = multiplier
        self.register_buffer("sigmas", self.sigma(torch.arange(1, timesteps + 1) / timesteps * multiplier))

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        time = timestep / self.multiplier
        return self.shift * time / (1 + (self.shift - 1) * time)

    def _denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma.view(-1, *[1] * (output.dim() - 1))
