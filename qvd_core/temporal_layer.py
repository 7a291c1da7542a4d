"""`TemporalLinear`: a projection of the timestep embedding, with HTDQ features and an int8 weight. METHOD section 2.

It sees a handful of distinct rows per step, so it is bound by reading the weight, never by arithmetic: the features are
coded through a codebook (log and power codes are not affine, no integer GEMM applies) and the weight is dequantized on
the fly. A GEMM rounds a row differently in other company, so each distinct row is projected on its own. With
`temporal="table"` the result is remembered and looked up from then on, bit for bit what `temporal="online"` computes,
whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.layers import QuantizedLayer
from qvd_core.ops import gradient
from qvd_core.spec import QuantSpec
from qvd_core.temporal import TemporalQuantizer
from qvd_core.temporal_rows import Key, RowTable, distinct_rows, row_keys

if TYPE_CHECKING:
    from qvd_core.plan import LayerPlan

TABLE_ROWS = 128  # steps of one sampling run, with room for a change of scheduler or prompt
MAX_SINGLE_ROWS = 64  # more distinct rows in one call than that are cheaper as one product


class TemporalLinear(QuantizedLayer, nn.Linear):
    """y = Q(x) @ dequantized int8 weight^T + bias, once per distinct row.

    Codebook buffers (where fitted), float32, C = in_features, b = activation bits:
    levels [2^b], boundaries [2^b - 1], offset [C], gain [C]; unused tails repeat the last level / the largest float.

    The table holds outputs [N] in the dtype of the input, by the *quantized* row: features that differ by rounding
    alone (another batch size, another kernel) share one entry, and whatever the embedding holds beside the timestep
    (prompt, fps, guidance), a change of it or of the scheduler is just another row. Of more than `TABLE_ROWS` the
    least recently used leaves, so that a step never costs more than `online` and one stored row.
    Memory, all projections together: HunyuanVideo (13 B) has 1.11 M outputs, that is 2.2 MB per row in bfloat16, 111 MB
    for 50 steps and 283 MB for 128 rows, beside int8 weights of 3.4 GB; CogVideoX-5B has 1.55 M, 3.1 MB per row, beside
    0.8 GB; Wan 14B has 31 k, 61 kB per row, beside 157 MB.
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
        self.table = RowTable(TABLE_ROWS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with an empty table: it costs memory and fills itself."""
        return {**self.__dict__, "table": RowTable(TABLE_ROWS)}

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] of any float dtype -> [..., N] of the same dtype.

        Compiled or traced it is one plain product: the same up to the rounding of its sums.
        """
        rows = input.reshape(-1, self.in_features)
        watched = torch.is_grad_enabled() and gradient.wanted(input, self.bias)
        out = gradient.linear(self, input, rows) if watched else self.infer(input, rows)
        return out.view(*input.shape[:-1], self.out_features)

    def infer(self, input: Tensor, operand: Tensor) -> Tensor:
        """The projection, without gradients: input [..., C], operand its rows [M, C] -> [M, N] of the same dtype."""
        traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        plain = traced or operand.is_meta or len(operand) == 0
        return self.project(operand).to(input.dtype) if plain else self._project_distinct(operand)

    def project(self, rows: Tensor) -> Tensor:
        """rows [M, C] -> float32 [M, N] in one product."""
        weight, bias = self._operands(rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(self.round(rows), weight, bias)

    def round(self, rows: Tensor) -> Tensor:
        """rows [M, C] of any float dtype -> what their codes decode to, float32 [M, C]; NaN has no code and stays."""
        rows = rows.float()
        if self.levels is None:
            return rows
        code = torch.bucketize((rows - self.offset) / self.gain, self.boundaries)
        decoded = self.levels[code] * self.gain + self.offset
        return torch.where(rows.isnan(), rows, decoded)

    def remember(self, rows: Tensor) -> int:
        """Make sure the table holds the outputs of rows [M, C]; how many it did not."""
        new = sum(key not in self.table for key in set(row_keys(self.round(rows), rows.dtype)))
        self._project_rows(rows, self.table)
        return new

    def _project_distinct(self, rows: Tensor) -> Tensor:
        """rows [M, C] -> [M, N] of their dtype. What is taken together depends on `rows` alone, never on the table."""
        table = self._table_for(rows)
        if len(rows) <= MAX_SINGLE_ROWS:
            return self._project_rows(rows, table)
        found = distinct_rows(rows)  # per-token timesteps: many rows, few of them distinct
        if found is None or 2 * len(found[0]) > len(rows):
            return self.project(rows).to(rows.dtype)
        first, inverse = found
        few = rows[first]
        single = len(few) <= MAX_SINGLE_ROWS
        return (self._project_rows(few, table) if single else self.project(few).to(rows.dtype))[inverse]

    def _table_for(self, rows: Tensor) -> RowTable | None:
        """The table, where outputs are worth remembering: not in training, which rarely sees a timestep twice."""
        if self.bias is not None and self.bias.requires_grad:
            self.forget()  # the next step of the optimizer would leave the old bias in it
            return None
        training = torch.is_grad_enabled() or rows.requires_grad
        return None if training or self.spec.temporal != "table" else self.table

    def _project_rows(self, rows: Tensor, table: RowTable | None) -> Tensor:
        """rows [M, C] -> [M, N] of their dtype, each distinct one on its own, through a table where there is one."""
        rounded = self.round(rows)
        keys = row_keys(rounded, rows.dtype)
        outputs: dict[Key, Tensor] = {}
        new = []
        for key in dict.fromkeys(keys):
            output = table.get(key) if table is not None else None
            if output is None:
                new.append(key)
            else:
                outputs[key] = output
        if new:
            weight, bias = self._operands(rows.device)
        for key in new:
            row = rounded[keys.index(key)][None].clone()  # its place in memory must not matter either
            with torch.autocast(rows.device.type, enabled=False):
                outputs[key] = F.linear(row, weight, bias)[0].to(rows.dtype)
            if table is not None:
                table.add(key, outputs[key])
        return torch.stack([outputs[key] for key in keys])

    def _operands(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """float32 weight [N, C] and bias [N] on the device of the rows.

        Offloaded weights are sent there, in int8, for this one use: the same kernel gives the same bits, and sending
        them takes less time than a product on the CPU.
        """
        if self.weight.device == device:
            weight = self.dequantized_weight()
        else:
            weight = self.weight.to(device).float() * self.weight_scale.to(device)
        return weight, None if self.bias is None else self.bias.to(device).float()

    def extra_repr(self) -> str:
        features = f"A{self.spec.activation_bits} codebook" if self.levels is not None else "full-precision features"
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}, {features}, {self.spec.temporal}"


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
