"""The reference backend: integer sums in float64; slow, and the judge of all others.

A float64 sum of int8 products is exact below 2^53, that is up to 5 * 10^11 terms.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops.backend import Backend


class Reference(Backend):
    """float64 from end to end; convolutions through their windows."""

    def integer_linear(self, codes: Tensor, weight: Tensor) -> Tensor:
        return F.linear(codes.double(), weight.double()).float()
