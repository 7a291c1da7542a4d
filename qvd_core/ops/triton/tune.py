"""Measure tiles on the GPU at hand and rewrite the committed table: `python -m qvd_core.ops.triton.tune`.

The committed numbers are starting values, chosen from register and shared-memory budgets: no GPU was at hand. A run
replaces the rules of the GPU's architecture only; each rule keeps its limits and gets the fastest tile of those tried
at the largest shape it is for. Results of every tile are compared with the emulated backend's before they count.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.ops.emulated import Emulated
from qvd_core.ops.triton import conv, gemm
from qvd_core.ops.triton.backend import missing
from qvd_core.ops.triton.launch import Launch, capability
from qvd_core.ops.triton.tiles import KINDS, SHARED_MEMORY, TABLE, Tile, architecture, read_tiles, write_tiles

LARGEST = (32768, 5120, 5120)  # M, N, K where a rule has no limit: the tokens and channels of a 14B video model
LARGEST_CONV = (16 * 64 * 64, 320, 320)

Planner = Callable[[Tile], tuple[Tensor, Launch]]


def candidates(kind: str, shared_memory: int) -> Iterator[Tile]:
    """Tiles worth trying: accumulators of at most 128 registers per thread, stages within the shared memory."""
    sides = (16, 32, 64) if kind == "weight_only" else (16, 32, 64, 128, 256)
    operand = 2 if kind == "weight_only" else 1  # bytes of an element of the first factor
    for m, n, k, warps, stages in itertools.product(sides, (32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (3, 4, 5)):
        in_flight = (m * operand + n) * k * stages
        if 16 <= m * n // (32 * warps) <= 128 and in_flight <= shared_memory * 9 // 10:
            yield Tile(m, n, k, warps, stages)


def planner(kind: str, rule: Tile, device: torch.device) -> tuple[Planner, Tensor]:
    """The product a rule is tuned on, as a function of the tile, and its right result."""
    largest = LARGEST_CONV if kind == "conv" else LARGEST
    m, n, k = (limit or most for limit, most in zip((rule.max_m, rule.max_n, rule.max_k), largest, strict=True))
    dtype = torch.bfloat16
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, 1, device=device) * 1e-3
    exact = Emulated()
    if kind == "weight_only":
        x = torch.randn(min(m, 64), k, device=device).to(dtype)
        right = exact.weight_only_linear(x.float(), weight, scale, None, torch.float32)
        return lambda tile: gemm.plan_weight_only(x, weight, scale, None, dtype, tile), right
    if kind == "conv":
        codes = torch.randint(-127, 128, (16, 66, 66, k), dtype=torch.int8, device=device)
        step, taps = torch.rand(16, 1, device=device), [3, 3]
        weight = torch.randint(-127, 128, (n, k, 3, 3), dtype=torch.int8, device=device)
        right = exact.conv(codes, step, weight, scale, None, taps, [1, 1], [1, 1], torch.float32)
        return lambda tile: conv.plan_conv(codes, step, weight, scale, None, taps, [1, 1], [1, 1], dtype, tile), right
    codes, step = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device), torch.rand(m, 1, device=device)
    if kind == "linear_packed":
        m = min(m, gemm.IN_KERNEL_ROWS)
        codes, step = codes[:m], step[:m]
        weight = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8, device=device) & 0x77
    right = exact.linear(codes, step, weight, scale, None, None, None, torch.float32)
    return lambda tile: gemm.plan_linear(codes, step, weight, scale, None, None, None, dtype, tile), right


def fastest(kind: str, rule: Tile, device: torch.device) -> tuple[Tile, float]:
    """The fastest right tile for a rule, and its milliseconds."""
    from triton.testing import do_bench

    plan, right = planner(kind, rule, device)
    best, least = rule, float("inf")
    shared = SHARED_MEMORY[architecture(capability(device))]
    for tile in itertools.chain([rule], candidates(kind, shared)):
        tried = replace(tile, group_m=rule.group_m, max_m=rule.max_m, max_n=rule.max_n, max_k=rule.max_k)
        out, launch = plan(tried)
        try:
            launch.run(device)
            torch.testing.assert_close(out.float(), right, rtol=2**-7, atol=1e-2)
            spent = float(do_bench(lambda launch=launch: launch.run(device), warmup=10, rep=50))
        except Exception as error:  # out of registers or shared memory, or wrong: a tile that is not for this GPU
            print(f"  {tried.to_dict()}: {type(error).__name__}", file=sys.stderr)
            continue
        if spent < least:
            best, least = tried, spent
    return best, least


def main() -> int:
    """Tune the architecture of the current GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m qvd_core.ops.triton.tune", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to tune (default: all)")
    parser.add_argument("--output", type=Path, default=TABLE, help="table to write (default: the committed one)")
    arguments = parser.parse_args()
    try:
        tune(arguments.kinds, arguments.output)
    except QVDError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def tune(kinds: list[str], output: Path) -> None:
    """Rewrite the rules of `kinds` for the current GPU. Raises QVDError where there is none that runs the kernels."""
    if not torch.cuda.is_available():
        raise QVDError("there is no CUDA GPU to tune on: run this on the machine that will sample.")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = missing(device)
    if reason:
        raise QVDError(f"cannot tune on {torch.cuda.get_device_name(device)}: {reason}.")
    table = read_tiles(TABLE)
    name = architecture(capability(device))
    for kind in kinds:
        for index, rule in enumerate(table[name][kind]):
            table[name][kind][index], spent = fastest(kind, rule, device)
            print(f"{name} {kind}[{index}]: {table[name][kind][index].to_dict()} {spent:.3f} ms")
    import triton

    note = (
        f"{name} ({', '.join(kinds)}) measured on {torch.cuda.get_device_name(device)} with triton {triton.__version__}"
    )
    write_tiles(output, table, f"{note}; the rest are unmeasured starting values.")


if __name__ == "__main__":
    sys.exit(main())
