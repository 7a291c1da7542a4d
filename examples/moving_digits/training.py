"""One training loop for every miniature: time budget, resume, progress bar, EMA, seeds.

The budget is minutes of wall time, so the learning rate follows the share of the budget that is spent:
a short warm-up, constant over the first half, linear to zero over the second half.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class TrainingOptions:
    """What a run may be told from the command line; `minutes` is wall time, `threads` CPU threads."""

    minutes: float = 60.0
    learning_rate: float = 1.5e-3
    seed: int = 0
    threads: int = 1
    ema_decay: float = 0.995
    warmup_steps: int = 60
    save_every_seconds: float = 60.0

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, **defaults: float) -> None:
        """Add `--minutes`, `--learning-rate`, `--seed` and `--threads` with this run's defaults."""
        parser.add_argument("--minutes", type=float, default=defaults.get("minutes", 60.0))
        parser.add_argument("--learning-rate", type=float, default=defaults.get("learning_rate", 1.5e-3))
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--threads", type=int, default=1)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> TrainingOptions:
        return cls(args.minutes, args.learning_rate, args.seed, args.threads)


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    options: TrainingOptions,
    checkpoint: Path,
    describe: str,
) -> int:
    """Train `module` until the budget is spent and leave its EMA weights in it; returns the number of steps taken.

    `loss_of_step(step)` returns a scalar loss; it seeds its own draws from `step`, so a resumed run sees fresh data.
    The run continues from `checkpoint` when that file exists, and writes it every minute (temporary file, then rename).
    """
    torch.set_num_threads(options.threads)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    step, spent = _resume(checkpoint, parameters, average, optimizer)
    budget = options.minutes * 60.0
    last_save = last_tick = time.monotonic()
    smoothed: float | None = None
    with tqdm(total=round(budget), initial=round(min(spent, budget)), unit="s", desc=describe, mininterval=5) as bar:
        while spent < budget:
            rate = options.learning_rate * _rate_factor(step, spent / budget, options.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            decay = min(options.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
            value = float(loss.detach())
            smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
            now = time.monotonic()
            spent, last_tick = spent + now - last_tick, now
            bar.update(max(0, round(min(spent, budget)) - bar.n))
            bar.set_postfix(step=step, loss=f"{smoothed:.4f}", refresh=False)
            if now - last_save > options.save_every_seconds:
                _save(checkpoint, step, spent, parameters, average, optimizer)
                last_save = now
    _save(checkpoint, step, spent, parameters, average, optimizer)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    return step


def _rate_factor(step: int, progress: float, warmup_steps: int) -> float:
    warmup = min(1.0, (step + 1) / warmup_steps)
    return warmup * (1.0 if progress < 0.5 else max(0.0, 2.0 * (1.0 - progress)))


def _save(
    path: Path,
    step: int,
    spent: float,
    parameters: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.AdamW,
) -> None:
    tensors = {"step": torch.tensor(step), "spent": torch.tensor(spent, dtype=torch.float64)}
    for index, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
        tensors[f"parameter.{index}"] = parameter.detach()
        tensors[f"average.{index}"] = mean
        state = optimizer.state.get(parameter)
        if state:
            tensors[f"moment1.{index}"], tensors[f"moment2.{index}"] = state["exp_avg"], state["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def _resume(
    path: Path, parameters: list[nn.Parameter], average: list[Tensor], optimizer: torch.optim.AdamW
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    tensors = load_file(path)
    step = int(tensors["step"])
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
            average[index].copy_(tensors[f"average.{index}"])
            if f"moment1.{index}" in tensors:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"moment1.{index}"].clone(),
                    "exp_avg_sq": tensors[f"moment2.{index}"].clone(),
                }
    return step, float(tensors["spent"])
