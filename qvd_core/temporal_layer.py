"""`TemporalLinear`: a projection of the timestep embedding, with HTDQ features and an int8 weight. METHOD section 2.

It sees a handful of distinct rows per step, so it is bound by reading the weight, never by arithmetic: the features are
coded through a codebook (log and power codes are not affine, no integer GEMM applies), the weight is dequantized on the
fly, and with `temporal="table"` every row that was projected once is remembered and looked up from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.layers import QuantizedLayer
from qvd_core.spec import QuantSpec
from qvd_core.temporal import TemporalQuantizer

if TYPE_CHECKING:
    from qvd_core.plan import LayerPlan

TABLE_ROWS = 128  # steps of one sampling run, with room for a change of scheduler
MAX_DISTINCT_LOOKUPS = 64  # more rows are per-token timesteps: comparing them would cost more than it saves


class TemporalLinear(QuantizedLayer, nn.Linear):
    """y = Q(x) @ dequantized int8 weight^T + bias, remembered per row.

    Codebook buffers (where fitted), float32, C = in_features, b = activation bits:
    levels [2^b], boundaries [2^b - 1], offset [C], gain [C]; unused tails repeat the last level / the largest float.
    """

    levels: Tensor | None
    boundaries: Tensor
    offset: Tensor
    gain: Tensor

    def __init__(self, source: nn.Linear, plan: LayerPlan, spec: QuantSpec, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self._allocate(spec, plan, source.weight.shape, dtype)
        fitted = "codebook" in plan.tensors
        count = 2**spec.activation_bits
        self._buffer("levels", (count,) if fitted else None)
        self._buffer("boundaries", (count - 1,) if fitted else None)
        self._buffer("offset", (self.in_features,) if fitted else None)
        self._buffer("gain", (self.in_features,) if fitted else None)
        self.forget()

    def forget(self) -> None:
        """Empty the table; needed after a change of weight, bias or codebook."""
        self._table: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] of any float dtype -> [..., N] of the same dtype."""
        rows = input.reshape(-1, self.in_features)
        use_table = (
            self.spec.temporal == "table"
            and 0 < len(rows) <= MAX_DISTINCT_LOOKUPS
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
        )
        out = self._look_up(rows.float()) if use_table else self.project(rows)
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def project(self, rows: Tensor) -> Tensor:
        """The online path: rows [M, C] -> float32 [M, N]."""
        rows = rows.float()
        if self.levels is not None:
            code = torch.bucketize((rows - self.offset) / self.gain, self.boundaries)
            decoded = self.levels[code] * self.gain + self.offset
            rows = torch.where(rows.isnan(), rows, decoded)  # NaN has no code, and must not vanish in one
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows, self.dequantized_weight(), bias)

    def _look_up(self, rows: Tensor) -> Tensor:
        """Project rows [M, C] through the table, adding what it does not hold yet."""
        index = self._find(rows)
        while (index < 0).any():  # more than once where new rows push known ones of this call out
            if not rows.isfinite().all():
                return self.project(rows)  # NaN equals nothing, so it could never be found again
            self._remember(rows[index < 0])
            index = self._find(rows)
        assert self._table is not None
        return self._table[1][index]

    def _find(self, rows: Tensor) -> Tensor:
        """int64 [M]: where each row stands in the table, -1 where it does not."""
        if self._table is None or self._table[0].device != rows.device:
            return torch.full((len(rows),), -1, device=rows.device)
        same = (rows[:, None] == self._table[0][None]).all(dim=-1)  # [M, T]
        return torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)

    def _remember(self, rows: Tensor) -> None:
        """Project new rows one at a time, independent of their neighbours, and append; the oldest leave."""
        rows = torch.unique(rows, dim=0)
        outputs = torch.cat([self.project(row[None]) for row in rows])
        if self._table is not None and self._table[0].device == rows.device:
            rows, outputs = torch.cat([self._table[0], rows]), torch.cat([self._table[1], outputs])
        self._table = (rows[-TABLE_ROWS:], outputs[-TABLE_ROWS:])

    def extra_repr(self) -> str:
        features = f"A{self.spec.activation_bits} codebook" if self.levels is not None else "full-precision features"
        return f"{self.in_features}, {self.out_features}, W{self.spec.weight_bits}, {features}, {self.spec.temporal}"


def codebook_tensors(quantizer: TemporalQuantizer, channels: int) -> dict[str, Tensor]:
    """A fitted quantizer as a layer's buffers: levels [2^b], boundaries [2^b - 1], offset [C], gain [C], float32."""
    count = 2**quantizer.bits
    levels = F.pad(quantizer.levels, (0, count - len(quantizer.levels)), value=float(quantizer.levels[-1]))
    unreachable = torch.finfo(torch.float32).max
    boundaries = F.pad(quantizer.boundaries, (0, count - 1 - len(quantizer.boundaries)), value=unreachable)
    return {
        "levels": levels.float().clone(),
        "boundaries": boundaries.float().clone(),
        "offset": quantizer.offset.float().expand(channels).clone(),
        "gain": quantizer.gain.float().expand(channels).clone(),
    }
