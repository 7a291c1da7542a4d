"""The training loop: it learns, stops in time, resumes where it was, and leaves the averaged weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.moving_digits.training import TrainingOptions, train


def _problem() -> tuple[nn.Linear, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    def loss(step: int) -> Tensor:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x).square().mean()

    return model, loss


def test_training_learns_and_resumes(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    model, loss = _problem()
    before = loss(0).item()
    first = train(model, loss, TrainingOptions(minutes=0.005, learning_rate=0.05, warmup_steps=5), checkpoint, "first")
    model, loss = _problem()
    second = train(model, loss, TrainingOptions(minutes=0.02, learning_rate=0.05, warmup_steps=5), checkpoint, "second")
    assert second > first > 0
    assert loss(0).item() < before / 2
    assert [file.name for file in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_finished_run_takes_no_further_step_and_restores_its_average(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    options = TrainingOptions(minutes=0.005, warmup_steps=5)
    model, loss = _problem()
    steps = train(model, loss, options, checkpoint, "run")
    trained = model.weight.detach().clone()
    model, loss = _problem()
    assert train(model, loss, options, checkpoint, "again") == steps
    assert torch.equal(model.weight, trained)
