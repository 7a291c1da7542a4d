"""Packing: two 4-bit weight codes in one byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.errors import QVDError

_LIMIT = 7  # a symmetric grid of 4 bits


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes [N, ...] in [-7, 7] into uint8 [N, ceil(K / 2)], K the product of all dimensions but the first.

    Nibbles are two's complement; the even index is the low one, and an odd K ends in a nibble of zero. [O]
    Raises QVDError on other dtypes and on codes beyond 4 bits (not looked for on the meta device or in compiled code).
    """
    if codes.dtype != torch.int8 or codes.dim() < 2:
        raise QVDError(f"4-bit packing takes int8 codes [N, ...], got {codes.dtype} {list(codes.shape)}.")
    if not codes.is_meta and codes.numel() and not torch.compiler.is_compiling():
        low, high = codes.aminmax()
        if low < -_LIMIT or high > _LIMIT:
            raise QVDError(
                f"4-bit packing takes codes in [-{_LIMIT}, {_LIMIT}], got [{int(low)}, {int(high)}]: "
                "quantize the weight to 4 bits first."
            )
    flat = codes.flatten(1)
    pairs = F.pad(flat, (0, flat.shape[1] % 2)).view(torch.uint8) & 0xF
    return pairs[:, 0::2] | (pairs[:, 1::2] << 4)


def unpack_int4(packed: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `pack_int4`: uint8 [N, ceil(K / 2)] -> int8 codes of `shape` [N, ...]. [O]

    Raises QVDError when `packed` cannot hold that shape.
    """
    count = shape[1:].numel()
    if packed.dtype != torch.uint8 or packed.shape != (shape[0], (count + 1) // 2):
        raise QVDError(
            f"packed 4-bit codes of shape {list(shape)} are uint8 {[shape[0], (count + 1) // 2]}, "
            f"got {packed.dtype} {list(packed.shape)}."
        )
    # A left shift brings a nibble's sign bit to the byte's; the arithmetic right shift of int8 spreads it.
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(1)[:, :count].reshape(shape).contiguous()
