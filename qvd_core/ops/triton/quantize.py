"""Launches of the quantizing kernels: `quantize_rows`, `quantize_fused` and `quantize_images`.

Tiles are chosen for memory traffic: 16-byte vectors, 32 elements per thread, so that a multiprocessor has several tens
of kilobytes under way. They need no table: nothing here depends on more than the row's length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qvd_core.ops.fronts import Front, checked_front
from qvd_core.ops.semantics import code_limit
from qvd_core.ops.triton.launch import Launch, blocks, power_of_two

WHOLE_ROW = 16384  # channels of a row that stays in registers between its maximum and its codes
ROW_TILE = 8192  # elements of a program, where rows are shorter
LONG_ROW_TILE = 4096  # channels at a time of longer rows
SHORTEST_PART = 128  # of a row's two parts: no rotation block is longer
IMAGE_TILE = 4096
_STRIDES = ("stride_batch", "stride_channel", "stride_depth", "stride_height", "stride_width")
ELEMENTS_PER_THREAD = 32


def quantize_rows(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, static_step: Tensor | None, bits: int, rotation: int
) -> tuple[Tensor, Tensor]:
    """The contract of `Backend.quantize_rows`; x float32, bfloat16 or float16 [M, K]."""
    return _quantize(x, Front(), None, None, 0.0, shift, scale, static_step, bits, rotation)


def quantize_fused(
    x: Tensor,
    front: str,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `apply_front(x, front, gain, offset, eps)` without the tensor between the two. [O]

    x [M, K], or [M, 2 K] where gated; gain, offset [G, K] or None. Codes differ from the unfused ones by 1 at most, at
    ties. Raises QVDError as `apply_front` does.
    """
    checked = checked_front(x, front, gain, offset)
    gain, offset = _same_groups(gain, offset)
    return _quantize(x, checked, gain, offset, eps, shift, scale, static_step, bits, rotation)


def fits_fused(x: Tensor, front: Front) -> bool:
    """Whether a fused kernel exists: a norm needs the whole row in registers."""
    return not front.norm or x.shape[1] <= WHOLE_ROW


def _same_groups(gain: Tensor | None, offset: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both for the same number of groups: the kernel has one group index."""
    if gain is None or offset is None or len(gain) == len(offset):
        return gain, offset
    groups = math.lcm(len(gain), len(offset))
    return (
        gain.repeat_interleave(groups // len(gain), dim=0),
        offset.repeat_interleave(groups // len(offset), dim=0),
    )


def _quantize(
    x: Tensor,
    front: Front,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
) -> tuple[Tensor, Tensor]:
    codes, step, launch = plan_rows(x, front, gain, offset, eps, shift, scale, static_step, bits, rotation)
    launch.run(x.device)
    return codes, step


def plan_rows(
    x: Tensor,
    front: Front,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
) -> tuple[Tensor, Tensor, Launch]:
    """Codes and steps to be written, and the launch that writes them."""
    from qvd_core.ops.triton.quantize_kernels import quantize_long_rows_kernel, quantize_rows_kernel

    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, columns = x.shape[0], x.shape[1] // (2 if front.gated else 1)
    first, second = _row_parts(columns)
    tile_rows = max(ROW_TILE // power_of_two(first + second), 1)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    step = _own_steps(static_step, rows, x.device)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "codes_ptr": codes,
        "step_ptr": step,
        **_channel_arguments(static_step, shift, scale),
        "rows": rows,
        "columns": columns,
        "x_stride": x.stride(0),
        "static_stride": int(step.numel() > 1),
        "steps": step.numel(),
        "ROWS": tile_rows,
        "LIMIT": float(code_limit(bits)),
        **_rotation(rotation),
        "ACTIVATION": front.activation,
        "GATED": front.gated,
    }
    warps = _warps(tile_rows * (first + second))
    grid = (blocks(rows, tile_rows),)
    if columns > WHOLE_ROW:
        return codes, step, Launch(quantize_long_rows_kernel, grid, {**arguments, "WIDTH": first}, warps, 1)
    groups = next((len(tensor) for tensor in (gain, offset) if tensor is not None), 1)
    whole: dict[str, Any] = {
        "gain_ptr": None if gain is None else gain.contiguous(),
        "offset_ptr": None if offset is None else offset.contiguous(),
        "rows_per_group": max(rows // groups, 1),
        "eps": float(eps),
        "FIRST": first,
        "SECOND": second,
        "NORM": front.norm,
    }
    return codes, step, Launch(quantize_rows_kernel, grid, {**arguments, **whole}, warps, 1)


def _row_parts(columns: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that a row fits with few lanes idle; rotation blocks divide the first."""
    if columns > WHOLE_ROW:
        return LONG_ROW_TILE, 0
    first = power_of_two(columns)
    half = max(first // 2, SHORTEST_PART)
    second = max(power_of_two(columns - half), SHORTEST_PART)
    return (half, second) if half + second < first else (max(first, SHORTEST_PART), 0)


def quantize_images(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """The contract of `Backend.quantize_images`; x float32, bfloat16 or float16 [B, C, (D,) H, W] of any strides."""
    codes, step, launches = plan_images(x, shift, scale, static_step, bits, rotation, padding)
    for launch in launches:
        launch.run(x.device)
    return codes, step


def plan_images(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    padding: list[int],
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Codes and steps to be written, and the launches that write them: two passes where steps are dynamic."""
    from qvd_core.ops.triton.quantize_kernels import quantize_images_kernel

    spatial = x.dim() - 2
    ends = list(zip(reversed(padding[0::2]), reversed(padding[1::2]), strict=True))  # as F.pad: the last first
    padded = [extent + low + high for extent, (low, high) in zip(x.shape[2:], ends, strict=True)]
    codes = torch.empty(x.shape[0], *padded, x.shape[1], dtype=torch.int8, device=x.device)
    if spatial == 2:
        x, ends, padded = x.unsqueeze(2), [(0, 0), *ends], [1, *padded]
    batch, channels = x.shape[:2]
    step = _own_steps(static_step, batch, x.device)
    most = torch.zeros(batch, dtype=torch.int32, device=x.device) if static_step is None else None
    tile_pixels = min(max(power_of_two(padded[2]), 16), 64)
    tile_channels = min(max(power_of_two(channels), 16), 128, IMAGE_TILE // tile_pixels)
    tile_channels = max(tile_channels, rotation)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "codes_ptr": codes,
        "step_ptr": step,
        "bits_ptr": most,
        **_channel_arguments(static_step, shift, scale),
        "channels": channels,
        **dict(zip(("depth", "height", "width"), x.shape[2:], strict=True)),
        **dict(zip(("padded_depth", "padded_height", "padded_width"), padded, strict=True)),
        **dict(zip(("low_depth", "low_height", "low_width"), (low for low, _ in ends), strict=True)),
        **dict(zip(_STRIDES, x.stride(), strict=True)),
        "static_stride": int(step.numel() > 1),
        "steps": step.numel(),
        "PIXELS": tile_pixels,
        "CHANNELS": tile_channels,
        "LIMIT": float(code_limit(bits)),
        **_rotation(rotation),
    }
    grid = (batch * padded[0] * padded[1] * blocks(padded[2], tile_pixels), blocks(channels, tile_channels))
    warps = _warps(tile_pixels * tile_channels)
    passes = [True, False] if static_step is None else [False]
    launches = [Launch(quantize_images_kernel, grid, {**arguments, "MEASURE": measure}, warps, 1) for measure in passes]
    return codes, step, launches


def _own_steps(static_step: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """The steps that are returned: the kernel writes them, or, of a copy of static ones, makes them NaN."""
    if static_step is None:
        return torch.empty(rows, 1, dtype=torch.float32, device=device)
    return static_step.clone(memory_format=torch.contiguous_format)


def _channel_arguments(static_step: Tensor | None, shift: Tensor | None, scale: Tensor | None) -> dict[str, Any]:
    """The reciprocals are taken once here: one program sees a channel only a few times."""
    return {
        "static_ptr": None if static_step is None else static_step.float().contiguous(),
        "shift_ptr": None if shift is None else shift.float().contiguous(),
        "inverse_ptr": None if scale is None else scale.float().reciprocal().contiguous(),
    }


def _rotation(block: int) -> dict[str, Any]:
    """Constants of the rotation: butterflies and the float32 root that ends it."""
    stages = max(block, 1).bit_length() - 1
    return {"STAGES": stages, "ROOT": math.sqrt(max(block, 1))}


def _warps(elements: int) -> int:
    return min(power_of_two(blocks(elements, 32 * ELEMENTS_PER_THREAD)), 16)
