"""Timing that survives a busy machine: everything compared runs in turn, in one process, and only ratios are quoted.

    samples = interleave({"fp32": run_a, "int8": run_b}, clock_for(device), rounds=15, limit=60.0)
    samples.speed("int8", "fp32")        # how many times as fast: the median over rounds of the quotient of one round

On a CPU with one thread the clock is the thread's own CPU time, which other processes hardly touch; with several
threads it is the time on the wall. On a GPU it is the time between two events, with the L2 cache overwritten before.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

Function = Callable[[], object]

_FLUSH_BYTES = 2**26  # where a GPU does not say how large its L2 cache is
_PROCESS = Path("/proc/self")


class Clock(Protocol):
    """Measures one call."""

    @property
    def meaning(self) -> str:
        """What its seconds are, for reports."""
        ...

    def time(self, function: Function) -> float:
        """Seconds of one call of `function`."""
        ...


class WallClock:
    """Elapsed time of a call that has finished when it returns."""

    meaning = "time on the wall"

    def time(self, function: Function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


class ThreadClock:
    """CPU time of the calling thread; blind to work that other threads do."""

    meaning = "CPU time of the one thread"

    def time(self, function: Function) -> float:
        start = time.thread_time()
        function()
        return time.thread_time() - start


class CudaClock:
    """Time on the GPU from an event before the call to one after it; the caches are cold."""

    meaning = "GPU time between events, cold L2 cache"

    def __init__(self, device: torch.device):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.device = device
        # Twice the cache: some replacement policies keep half of what was there.
        self.flush = torch.empty(max(2 * cache, _FLUSH_BYTES), dtype=torch.int8, device=device)

    def time(self, function: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device):
            self.flush.zero_()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that fits the device and PyTorch's number of threads."""
    if device.type == "cuda":
        return CudaClock(device)
    return ThreadClock() if torch.get_num_threads() == 1 else WallClock()


@dataclass(frozen=True)
class Samples:
    """Seconds by name, one per round that the function took part in: the first rounds, for a slow one."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speed(self, name: str, reference: str) -> float:
        """How many times as fast as `reference` it is: the median of the quotients of the rounds both ran in."""
        return statistics.median(self._quotients(name, reference))

    def spread(self, name: str, reference: str) -> float | None:
        """Half the distance between the quartiles of those quotients, as a share of their median; None below 4."""
        quotients = self._quotients(name, reference)
        if len(quotients) < 4:
            return None
        low, middle, high = statistics.quantiles(quotients, n=4)
        return (high - low) / 2 / middle

    def _quotients(self, name: str, reference: str) -> list[float]:
        pairs = zip(self.seconds[reference], self.seconds[name], strict=False)
        return [before / max(after, 1e-9) for before, after in pairs]


def interleave(
    functions: Mapping[str, Function], clock: Clock, rounds: int, limit: float, always: Sequence[str] = ()
) -> Samples:
    """Time all functions in turn, round by round, for at most about `limit` seconds, but at least one round.

    Every round starts with another function, so that none always finds the caches its neighbour left. A function that
    alone would use up its share of the time sits out the later rounds; those in `always` (the references) do not.
    """
    share = limit / max(len(functions), 1)
    turns = {}
    for name, function in functions.items():
        first = clock.time(function)  # not counted: memory is touched, code is loaded
        turns[name] = rounds if name in always else max(1, int(min(rounds, share / max(first, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    end = time.monotonic() + limit
    for number in range(max(turns.values(), default=0)):
        if number and time.monotonic() > end:
            break
        first_name = number % len(names)
        for name in (*names[first_name:], *names[:first_name]):
            if number < turns[name]:
                seconds[name].append(clock.time(functions[name]))
    return Samples(seconds)


def peak_memory(function: Function, device: torch.device) -> int | None:
    """Bytes that one call needs beyond what is there before it, its result included; None where that cannot be seen.

    On a GPU as PyTorch's allocator counts them. On Linux the growth of the process's resident memory at its peak:
    buffers that a library keeps between calls are not in it, so call the function once before.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = function()
        torch.cuda.synchronize(device)
        del kept
        return int(torch.cuda.max_memory_allocated(device) - before)
    return _peak_resident(function)


def _peak_resident(function: Function) -> int | None:
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # memory that the allocator kept would be used again without being seen
        (_PROCESS / "clear_refs").write_text("5")  # sets the peak back to the present
        before = _resident("VmRSS")
    except (OSError, ValueError, TypeError):
        return None
    kept = function()
    peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def _resident(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) in bytes."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in {_PROCESS / 'status'}")
