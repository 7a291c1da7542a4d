"""Launch of the convolution kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qvd_core.ops.backend import output_size
from qvd_core.ops.triton.gemm import unpack_weight
from qvd_core.ops.triton.launch import Launch, blocks, capability
from qvd_core.ops.triton.tiles import Tile, find_tile


def conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The contract of `Backend.conv`, below 2^17 terms per output; two or three spatial dimensions."""
    terms = codes.shape[-1] * math.prod(kernel)
    if weight.dtype == torch.uint8:
        weight = unpack_weight(weight, terms)
    rows = len(codes) * math.prod(output_size(codes.shape[1:-1], kernel, stride, dilation))
    tile = find_tile("conv", capability(codes.device), rows, len(weight), codes.shape[-1])
    out, launch = plan_conv(codes, step, weight, weight_scale, bias, kernel, stride, dilation, dtype, tile)
    launch.run(codes.device)
    return out


def plan_conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
    tile: Tile,
) -> tuple[Tensor, Launch]:
    """The output to be written and the launch that writes it."""
    from qvd_core.ops.triton.conv_kernels import conv_kernel

    batch, *space, channels = codes.shape
    columns, taps = len(weight), math.prod(kernel)
    size = output_size(space, kernel, stride, dilation)
    out = torch.empty(batch, columns, *size, dtype=dtype, device=codes.device)
    rows = batch * math.prod(size)
    # The channels of a tap side by side, as they are in the codes; small beside what is multiplied.
    taps_first = weight.reshape(columns, channels, taps).transpose(1, 2).contiguous()
    arguments: dict[str, Any] = {
        "codes_ptr": codes.contiguous(),
        "weight_ptr": taps_first,
        "out_ptr": out,
        "step_ptr": step.contiguous(),
        "weight_scale_ptr": weight_scale.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "batch": batch,
        "channels": channels,
        "columns": columns,
        "step_stride": int(step.numel() > 1),
        **_three(("depth", "height", "width"), space),
        **_three(("out_depth", "out_height", "out_width"), size),
        **_three(("stride_d", "stride_h", "stride_w"), stride),
        **_three(("dilation_d", "dilation_h", "dilation_w"), dilation),
        **_three(("TAPS_D", "TAPS_H", "TAPS_W"), kernel),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "EVEN_K": channels % tile.block_k == 0,
    }
    grid = (blocks(rows, tile.block_m) * blocks(columns, tile.block_n),)
    return out, Launch(conv_kernel, grid, arguments, tile.warps, tile.stages)


def _three(names: tuple[str, str, str], values: list[int]) -> dict[str, int]:
    """Two dimensions are three with a depth of 1."""
    return dict(zip(names, [1] * (3 - len(values)) + list(values), strict=True))
