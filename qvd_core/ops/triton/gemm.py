"""Launches of the multiplying kernels: `linear`, `weight_only_linear`, `dequantize` (for other libraries' sums)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops.triton.launch import Launch, blocks, capability
from qvd_core.ops.triton.tiles import Tile, find_tile

IN_KERNEL_ROWS = 1024  # of packed weights: above, unpacking them once costs less than in every tile of rows
EPILOGUE_TILE = (16, 256)
UNPACK_TILE = (16, 256)


def linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The contract of `Backend.linear`, K below 2^17; packed weights are unpacked once where there are many rows."""
    if weight.dtype == torch.uint8 and len(codes) > IN_KERNEL_ROWS:
        weight = unpack_weight(weight, codes.shape[1])
    tile = find_tile(linear_kind(weight), capability(codes.device), len(codes), len(weight), codes.shape[1])
    out, launch = plan_linear(codes, step, weight, weight_scale, bias, residual, gate, dtype, tile)
    launch.run(codes.device)
    return out


def linear_kind(weight: Tensor) -> str:
    """The kind of tile for a weight: packed codes (uint8) are unpacked in the kernel."""
    return "linear_packed" if weight.dtype == torch.uint8 else "linear"


def plan_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> tuple[Tensor, Launch]:
    """The output to be written and the launch that writes it."""
    from qvd_core.ops.triton.gemm_kernels import linear_kernel

    codes, weight = _aligned(codes, weight)
    rows, terms = codes.shape
    columns, packed = len(weight), weight.dtype == torch.uint8
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    arguments: dict[str, Any] = {
        "codes_ptr": codes.contiguous(),
        "weight_ptr": weight.contiguous(),
        "out_ptr": out,
        **_epilogue_arguments(rows, step, weight_scale, bias, residual, gate),
        "rows": rows,
        "columns": columns,
        "terms": terms,
        "weight_stride": weight.shape[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "EVEN_K": terms % tile.block_k == 0,
        "PACKED": packed,
        "HALVES": residual is not None and tile.block_n > 128,
    }
    grid = (blocks(rows, tile.block_m) * blocks(columns, tile.block_n),)
    return out, Launch(linear_kernel, grid, arguments, tile.warps, tile.stages)


def dequantize(
    total: Tensor,
    step: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The epilogue alone: integer sums int32 [M, N], rows contiguous -> `dtype` [M, N]."""
    out, launch = plan_dequantize(total, step, weight_scale, bias, residual, gate, dtype)
    launch.run(total.device)
    return out


def plan_dequantize(
    total: Tensor,
    step: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Launch]:
    """The output to be written and the launch that writes it."""
    from qvd_core.ops.triton.gemm_kernels import epilogue_kernel

    rows, columns = total.shape
    out = torch.empty(rows, columns, dtype=dtype, device=total.device)
    arguments: dict[str, Any] = {
        "total_ptr": total,
        "out_ptr": out,
        **_epilogue_arguments(rows, step, weight_scale, bias, residual, gate),
        "rows": rows,
        "columns": columns,
        "total_stride": total.stride(0),
        "BLOCK_M": EPILOGUE_TILE[0],
        "BLOCK_N": EPILOGUE_TILE[1],
    }
    grid = (blocks(rows, EPILOGUE_TILE[0]), blocks(columns, EPILOGUE_TILE[1]))
    return out, Launch(epilogue_kernel, grid, arguments, 4, 1)


def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """x [M, K] (transformed, not quantized) x weight codes int8 [N, K] or packed 4-bit -> `dtype` (that of x) [M, N].

    The codes become x's dtype in the kernel, which holds them exactly; sums are float32, times weight_scale [N, 1],
    plus bias. For few rows, whose time is that of reading the weight.
    """
    tile = find_tile("weight_only", capability(x.device), len(x), len(weight), x.shape[1])
    out, launch = plan_weight_only(x, weight, weight_scale, bias, dtype or x.dtype, tile)
    launch.run(x.device)
    return out


def plan_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile
) -> tuple[Tensor, Launch]:
    """The output to be written and the launch that writes it."""
    from qvd_core.ops.triton.gemm_kernels import weight_only_kernel

    x, weight = _aligned(x, weight)
    rows, terms = x.shape
    columns = len(weight)
    # The products of 32-bit inputs are three of TF32, exact for the codes: half the block for as many registers.
    block_k = tile.block_k // 2 if x.dtype == torch.float32 else tile.block_k
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    arguments: dict[str, Any] = {
        "x_ptr": x.contiguous(),
        "weight_ptr": weight.contiguous(),
        "out_ptr": out,
        "weight_scale_ptr": weight_scale.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "rows": rows,
        "columns": columns,
        "terms": terms,
        "weight_stride": weight.shape[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "EVEN_K": terms % block_k == 0,
        "PACKED": weight.dtype == torch.uint8,
    }
    grid = (blocks(columns, tile.block_n), blocks(rows, tile.block_m))
    return out, Launch(weight_only_kernel, grid, arguments, tile.warps, tile.stages)


def unpack_weight(packed: Tensor, terms: int) -> Tensor:
    """uint8 [N, ceil(terms / 2)] -> int8 [N, terms] in one pass."""
    codes, launch = plan_unpack(packed, terms)
    launch.run(packed.device)
    return codes


def plan_unpack(packed: Tensor, terms: int) -> tuple[Tensor, Launch]:
    """The codes to be written and the launch that writes them."""
    from qvd_core.ops.triton.gemm_kernels import unpack_kernel

    columns, width = packed.shape
    codes = torch.empty(columns, terms, dtype=torch.int8, device=packed.device)
    arguments: dict[str, Any] = {
        "packed_ptr": packed.contiguous(),
        "codes_ptr": codes,
        "columns": columns,
        "terms": terms,
        "weight_stride": width,
        "BLOCK_N": UNPACK_TILE[0],
        "BYTES": UNPACK_TILE[1],
    }
    return codes, Launch(
        unpack_kernel, (blocks(columns, UNPACK_TILE[0]), blocks(width, UNPACK_TILE[1])), arguments, 4, 1
    )


def _aligned(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros appended to a multiple of 16 bytes of codes: rows that start anywhere are read byte by byte."""
    multiple = 32 if weight.dtype == torch.uint8 else 16
    terms = blocks(rows.shape[1], multiple) * multiple
    if terms == rows.shape[1]:
        return rows, weight
    width = terms // 2 if weight.dtype == torch.uint8 else terms
    return F.pad(rows, (0, terms - rows.shape[1])), F.pad(weight, (0, width - weight.shape[1]))


def _epilogue_arguments(
    rows: int,
    step: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> dict[str, Any]:
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    return {
        "step_ptr": step.contiguous(),
        "weight_scale_ptr": weight_scale.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "residual_ptr": residual,
        "gate_ptr": None if gate is None else gate.contiguous(),
        "step_stride": int(step.numel() > 1),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "rows_per_gate": 1 if gate is None else rows // len(gate),
    }
