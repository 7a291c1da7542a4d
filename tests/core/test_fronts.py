"""What a fused front means, against PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qvd_core.errors import QVDError
from qvd_core.ops.fronts import FRONTS, apply_front

ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
GROUPS = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", F.gelu(ROWS)),
        ("gelu_tanh", F.gelu(ROWS, approximate="tanh")),
        ("silu", F.silu(ROWS)),
        ("gelu_mul", ROWS[:, :4] * F.gelu(ROWS[:, 4:])),
        ("gelu_tanh_mul", ROWS[:, :4] * F.gelu(ROWS[:, 4:], approximate="tanh")),
        ("silu_mul", ROWS[:, :4] * F.silu(ROWS[:, 4:])),
        ("layer_norm", F.layer_norm(ROWS, (8,), eps=1e-6)),
        ("rms_norm", F.rms_norm(ROWS, (8,), eps=1e-6)),
    ],
)
def test_each_front_is_the_operation_it_is_named_for(name: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(apply_front(ROWS, name), expected)


def test_every_front_is_tested_above() -> None:
    assert len(FRONTS) == 8


def test_each_group_of_rows_has_its_own_modulation() -> None:
    out = apply_front(ROWS, "layer_norm", 1 + GROUPS, -GROUPS)
    normed = F.layer_norm(ROWS, (8,), eps=1e-6).view(2, 3, 8)
    torch.testing.assert_close(out.view(2, 3, 8), normed * (1 + GROUPS[:, None]) - GROUPS[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_are_computed_in_float32(dtype: torch.dtype) -> None:
    rows = ROWS.to(dtype)
    out = apply_front(rows, "silu")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.silu(rows.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS, "swish"), "unknown fused front 'swish'"),
        ((ROWS[:, :7], "silu_mul"), r"takes rows \[M, 2 K\], got \[6, 7\]"),
        ((ROWS.view(2, 3, 8), "gelu"), r"takes rows \[M, K\]"),
        ((ROWS, "gelu", GROUPS), "takes no gain"),
        ((ROWS, "rms_norm", None, GROUPS[:, :4]), "offset of a fused norm"),
        ((ROWS, "rms_norm", GROUPS.repeat(2, 1)), r"G a divisor of 6 rows, got \[4, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(QVDError, match=message):
        apply_front(*arguments)
