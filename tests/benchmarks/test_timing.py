"""Timing on a busy machine: turns, quotients, limits, and the memory a call needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Samples, ThreadClock, interleave, peak_memory

CPU = torch.device("cpu")


class FakeClock:
    """A machine that gets slower with every call; each function is a name with its own cost."""

    meaning = "fake"

    def __init__(self, costs: dict[str, float]):
        self.costs, self.calls, self.slowness = costs, [], 1.0  # type: ignore[var-annotated]

    def time(self, function: Callable[[], object]) -> float:
        name = str(function())
        self.calls.append(name)
        self.slowness *= 1.01
        return self.costs[name] * self.slowness


def timed(costs: dict[str, float], rounds: int, limit: float, always: Sequence[str] = ()) -> tuple[Samples, FakeClock]:
    clock = FakeClock(costs)
    functions = {name: (lambda name=name: name) for name in costs}  # type: ignore[misc]
    return interleave(functions, clock, rounds, limit, always), clock


def test_a_machine_that_slows_down_leaves_the_quotients_as_they_are() -> None:
    samples, _ = timed({"fp32": 0.02, "int8": 0.01}, rounds=40, limit=1e9)
    assert samples.speed("int8", "fp32") == pytest.approx(2.0, rel=0.02)
    assert samples.seconds["int8"][-1] > 1.9 * samples.seconds["int8"][0]
    assert samples.spread("int8", "fp32") == pytest.approx(0.0, abs=0.02)


def test_every_round_starts_with_another_function() -> None:
    _, clock = timed({"a": 1.0, "b": 1.0, "c": 1.0}, rounds=3, limit=1e9)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"  # the first round is not counted


def test_a_slow_function_sits_out_but_runs_once_and_the_reference_always_runs() -> None:
    samples, _ = timed({"fp32": 0.5, "slow": 60.0, "fast": 0.1}, rounds=10, limit=9.0, always=("fp32",))
    assert {name: len(seconds) for name, seconds in samples.seconds.items()} == {"fp32": 10, "slow": 1, "fast": 10}


def test_the_limit_ends_the_rounds_after_the_first() -> None:
    samples, _ = timed({"fp32": 1.0}, rounds=10, limit=0.0, always=("fp32",))
    assert len(samples.seconds["fp32"]) == 1


def test_the_thread_clock_counts_work_and_not_waiting() -> None:
    assert ThreadClock().time(lambda: time.sleep(0.05)) < 0.02


def test_peak_memory_is_what_a_call_needs_at_its_worst() -> None:
    def call() -> Tensor:
        return (torch.ones(2**22) + 1).sum()  # 16 MiB twice

    found = peak_memory(call, CPU)
    if found is None:
        pytest.skip("this system does not let a process see its peak of resident memory")
    assert 2**24 * 1.5 < found < 2**24 * 3
