"""Error-compensating rounding: each weight column's rounding error is made good by the columns rounded after it.

For inputs X [S, K] the output error of rounded weights is e H e^T per output, e = w - q * scale [K], H = X^T X. With
H = U D U^T (U unit upper triangular) it is a sum of squares, sum_k D_k (e_k + sum_{j<k} e_j U_jk)^2: rounding column k
to w_k + sum_{j<k} e_j U_jk makes the k-th square as small as the columns before it allow. This gives the codes of GPTQ
(idea from the literature) without inverting H. [O]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.errors import QVDError

# The ridge on H is damping * (1 + _RIDGE_PER_COLUMN * K / S) * mean(diag H): the fewer the rows, the less their
# correlations mean on other rows. Measured on held-out rows of both miniatures, S from 32 to 2048, K from 32 to 864.
_RIDGE_PER_COLUMN = 8.0


@dataclass(frozen=True)
class Feedback:
    """How rounding errors pass from column to column, from one sample of inputs.

    order: int64 [K], columns as they are rounded, those with the most input energy first.
    matrix: float32 [K, K], U in that order. energy: float32 [K], D in that order, in units of the largest input.
    """

    order: Tensor
    matrix: Tensor
    energy: Tensor

    def round(self, weight: Tensor, scale: Tensor, limit: int, block: int = 128) -> tuple[Tensor, Tensor]:
        """Compensated codes int8 [N, K] of weight float32 [N, K] at scale [N, 1], and their error float32 [N] on H."""
        columns = weight[:, self.order].T.contiguous()  # [K, N]: a column of the weight is a row in memory
        scale = scale.view(-1)
        errors, codes = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.int8)
        loss = torch.zeros_like(scale)
        for start in range(0, len(columns), block):
            stop = min(start + block, len(columns))
            target = torch.addmm(columns[start:stop], self.matrix[:start, start:stop].T, errors[:start])
            for k in range(start, stop):
                row = k - start
                code = (target[row] / scale).round_().clamp_(-limit, limit)
                codes[k] = code.to(torch.int8)
                errors[k] = columns[k] - code * scale
                target[row + 1 :].addr_(self.matrix[k, k + 1 : stop], errors[k])
            left = target - codes[start:stop].float() * scale
            loss += (self.energy[start:stop, None] * left.square()).sum(dim=0)
        result = torch.empty_like(weight, dtype=torch.int8)
        result[:, self.order] = codes.T
        return result, loss


def rounding_feedback(rows: Tensor, damping: float = 0.01) -> Feedback:
    """The feedback of one sample of inputs, rows float32 [S, K]; needs about 4 float32 [K, K] while it runs.

    damping: ridge on H in units of its mean diagonal, raised for small samples. Columns without input have no feedback.
    Raises QVDError on rows that are empty or not finite.
    """
    rows = normalized_rows(rows).double()
    diagonal = rows.square().sum(dim=0)
    order = diagonal.argsort(descending=True, stable=True)
    # Cholesky gives lower times upper; on H with its columns reversed that is the upper times lower we need.
    rows = rows[:, order.flip(0)]
    gram = rows.T @ rows
    ridge = damping * (1.0 + _RIDGE_PER_COLUMN * rows.shape[1] / rows.shape[0])
    factor = _cholesky(gram, ridge, float(diagonal.mean()))
    del gram
    upper = factor.float().flip(0, 1)
    del factor
    root = upper.diagonal().clone()
    return Feedback(order, upper.div_(root), root.square())


def _cholesky(gram: Tensor, ridge: float, mean: float) -> Tensor:
    """Lower factor of gram + ridge * mean * I, with more ridge where that is not enough; changes `gram`."""
    mean = max(mean, 1e-30)  # no input at all: any diagonal will do
    added = 0.0
    while True:
        gram.diagonal().add_((ridge - added) * mean)
        factor, info = torch.linalg.cholesky_ex(gram)
        if not info.any():
            return factor
        added, ridge = ridge, max(10.0 * ridge, 1e-8)  # ends: a ridge of K makes any Gram matrix definite


def compensated_codes(
    weight: Tensor, scale: Tensor, rows: Tensor, limit: int, damping: float = 0.01, block: int = 128
) -> Tensor:
    """Codes int8 [N, K] in [-limit, limit] whose output error ||rows (weight - codes * scale)^T||^2 is small. [O]

    weight float32 [N, K], scale float32 [N, 1], rows float32 [S, K], a sample of the layer's input. An output that
    rounding to nearest serves better on these rows is rounded to nearest. `block` columns are updated at a time.
    Raises QVDError on rows that are empty, not finite or of another width.
    """
    nearest = nearest_codes(weight, scale, limit)
    return compensate(weight, nearest, scale, [scale], rows, limit, damping, block)[0]


def compensate(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    scales: Iterable[Tensor],
    rows: Tensor,
    limit: int,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """The best compensated codes int8 [N, K] over candidate scales [N, 1], and their scale [N, 1], per output. [O]

    `codes` and `scale` are a first solution, kept for the outputs where it has the smaller error on `rows`.
    Candidates are compared on the ridged H, which says more about other inputs. Otherwise as `compensated_codes`.
    """
    check_width(rows, weight.shape[1])
    feedback = rounding_feedback(rows.to(weight.device), damping)
    best_codes, best_scale, least = codes, scale, torch.full_like(scale.view(-1), torch.inf)
    for candidate in scales:
        rounded, loss = feedback.round(weight, candidate, limit, block)
        better = (loss < least).view(-1, 1)
        best_codes = torch.where(better, rounded, best_codes)
        best_scale = torch.where(better, candidate, best_scale)
        least = torch.minimum(loss, least)
    sample = normalized_rows(rows.to(weight.device))
    before = output_error(weight - codes.float() * scale, sample)
    after = output_error(weight - best_codes.float() * best_scale, sample)
    better = (after < before).view(-1, 1)
    return torch.where(better, best_codes, codes), torch.where(better, best_scale, scale)


def nearest_codes(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    """int8 codes, shape of the weight, of the nearest grid points."""
    return (weight / scale).round().clamp(-limit, limit).to(torch.int8)


def output_error(difference: Tensor, rows: Tensor) -> Tensor:
    """Squared output error float32 [N] that a weight difference [N, K] makes on rows [S, K]."""
    return (rows @ difference.T).square().sum(dim=0)


def check_width(rows: Tensor, width: int) -> None:
    """Raise QVDError unless rows are [S, width]."""
    if rows.dim() != 2 or rows.shape[1] != width:
        raise QVDError(
            f"error-compensating rounding of this weight needs input rows [S, {width}], got {list(rows.shape)}: "
            "they are of another layer."
        )


def normalized_rows(rows: Tensor) -> Tensor:
    """rows float32 [S, K] divided by their largest magnitude, so that no square overflows; QVDError if not finite."""
    if not rows.numel():
        raise QVDError("error-compensating rounding got no input rows: calibrate with inputs that reach the layer.")
    rows = rows.float()
    peak = rows.abs().max()
    if not peak.isfinite():
        raise QVDError(
            "the input rows for error-compensating rounding hold NaN or infinite values: calibrate again in float32 or "
            'bfloat16, or use rounding="nearest".'
        )
    return rows / peak.clamp(min=torch.finfo(torch.float32).tiny)
