"""What the int8 operators compute, said once in plain PyTorch. Every operation is float32 and rounds once.

Quantize:  x~ = (x - shift) * (1 / scale), rotated where the layer is;
           code = clamp(rint(x~ * (1 / step)), -q_max, q_max), q_max = 2^(bits-1) - 1.
Multiply:  y = (sum_k code_mk * w_nk) * step_m * weight_scale_n + bias_n, then gate and residual: an exact integer sum,
           rounded once to float32, and float32 from there.

Both quotients are products with a reciprocal: it is taken once per channel and once per row, and a product rounds alike
on every device, so that the codes of all backends are equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvd_core.rotation import hadamard

# Below any useful activation step, far above float32's denormals: an all-zero token gets codes 0, not 0 / 0.
MINIMUM_STEP = 1e-20


def code_limit(bits: int) -> int:
    """q_max of a symmetric grid of `bits` bits: 127 for 8."""
    return 2 ** (bits - 1) - 1


def transform(x: Tensor, shift: Tensor | None, scale: Tensor | None, rotation: int = 0) -> Tensor:
    """SCRI's (x - shift) / scale in float32; x [..., K], shift and scale float32 [K] or None.

    rotation: the size of the blocks of channels that are rotated afterwards, 0 for none.
    """
    x = x.float()
    if shift is not None:
        x = x - shift
    if scale is not None:
        x = x * scale.reciprocal()
    return hadamard(x, rotation) if rotation else x


def token_step(x: Tensor, bits: int, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """Dynamic step, one for all elements along `dims`: max|x| / q_max, float32, dims kept."""
    # A tensor as divisor: by a number, a GPU multiplies with the rounded reciprocal instead.
    limit = torch.full((), float(code_limit(bits)), device=x.device)
    return (x.abs().amax(dim=dims, keepdim=True) / limit).clamp(min=MINIMUM_STEP)


def checked_step(x: Tensor, static_step: Tensor) -> Tensor:
    """Static steps for x, of any shape: own copies, NaN where x holds NaN, which must not vanish in a code."""
    return torch.where(x.isnan().any(), torch.nan, static_step)


def encode(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes of a transformed input: int8, shape of x; round half to even."""
    limit = code_limit(bits)
    return (x * step.reciprocal()).round_().clamp_(-limit, limit).to(torch.int8)


def epilogue(
    total: Tensor,
    step: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """residual + (float32 total * step * weight_scale + bias) * gate; all broadcastable, the last three optional."""
    out = total * step * weight_scale
    if bias is not None:
        out = out + bias.float()
    if gate is not None:
        out = out * gate.float()
    return out if residual is None else residual.float() + out
