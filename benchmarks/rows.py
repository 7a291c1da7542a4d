"""The rows of the quality table, as data: what is quantized how. Adding a row is adding one line to `ROWS`.

Names are unique. A row is one of
    reference   full precision, from the same noise (what all are compared with) and from other noise (the noise floor);
    baseline    what is usual without QVD: min-max, percentile, SmoothQuant, dynamic scales;
    qvd         QVD as a user would have it, and the steps of its ablation;
    peer        another project's quantizer, through its own API (`peers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

from torch import nn

from benchmarks.baselines import smoothquant
from benchmarks.peers import PEERS, Peer
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_diffusers.config import QVDConfig

Kind = Literal["reference", "baseline", "qvd", "peer"]
Edit = Callable[[Scales, nn.Module], Scales]

BITS: dict[str, tuple[int, int]] = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A6": (4, 6)}
"""Weight and activation bits of each table."""

GRANULARITIES = ("static", "static_bucket", "static_frame", "token")
FULL_PRECISION = "FP"
"""What stands in the place of the bits of the reference rows."""

_ALL = tuple(BITS)
_LOW = ("W6A6", "W4A8", "W4A6")  # where rounding is the limit
_STEPS = ("W6A6", "W4A8")  # where every step of the ablation is measured


@dataclass(frozen=True)
class Row:
    """One row.

    settings: `QuantSpec` fields that differ from the defaults; the bits come from the table.
    calibrated: False for a data-free quantization. edit: changes the calibrated scales before they are used.
    bits: the tables it stands in. other_noise: sampled from other noise than the reference.
    headline: part of the short list `--rows headline`.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = True
    edit: Edit | None = None
    peer: Peer | None = None
    bits: tuple[str, ...] = _ALL
    other_noise: bool = False
    headline: bool = False

    @property
    def granularity(self) -> str:
        """Of its activation scales; "" for full precision."""
        if self.peer is not None:
            return self.peer.granularity
        return "" if self.kind == "reference" else self.spec("W8A8").activation

    def spec(self, bits: str) -> QuantSpec:
        """The settings at "W8A8" etc."""
        weight_bits, activation_bits = BITS[bits]
        return QuantSpec(weight_bits=weight_bits, activation_bits=activation_bits, **self.settings)


def _paper() -> dict[str, Any]:
    chosen = QVDConfig.paper().spec.to_dict()
    return {name: value for name, value in chosen.items() if not name.endswith("_bits")}


def _peer_row(peer: Peer) -> Row:
    table = {"W6A8": "W6A6"}.get(peer.bits, peer.bits)  # shown beside the closest setting of ours
    return Row(peer.name, "peer", peer=peer, bits=(table,), headline=True)


_PLAIN: dict[str, Any] = {
    "shift": False,
    "scale": "none",
    "range": "minmax",
    "rounding": "nearest",
    "temporal_quantizer": "uniform",
    "bias_correction": False,
}
_HTDQ = {**_PLAIN, "temporal_quantizer": "auto"}
_SHIFT = {**_HTDQ, "shift": True}
_SCALE = {**_SHIFT, "scale": "search"}
_RANGE = {**_SCALE, "range": "search"}
_BIAS = {**_RANGE, "bias_correction": True}
_QVD = {**_BIAS, "rounding": "auto"}  # GPTQ below 8 bits
_ROTATED = {**_QVD, "rotate": True}


def _with(settings: Mapping[str, Any], activation: str) -> dict[str, Any]:
    return {**settings, "activation": activation}


ROWS: tuple[Row, ...] = (
    Row("full precision", "reference", bits=(FULL_PRECISION,)),
    Row("full precision, other noise", "reference", bits=(FULL_PRECISION,), other_noise=True),
    # One static scale per layer.
    Row("min-max", "baseline", _with(_PLAIN, "static"), headline=True),
    Row("percentile", "baseline", _with({**_PLAIN, "range": "quantile"}, "static"), headline=True),
    Row("SmoothQuant", "baseline", _with(_PLAIN, "static"), edit=smoothquant, headline=True),
    Row("min-max + HTDQ", "qvd", _with(_HTDQ, "static"), bits=_STEPS),
    Row("... + shift", "qvd", _with(_SHIFT, "static"), bits=_STEPS),
    Row("... + scale", "qvd", _with(_SCALE, "static"), bits=_STEPS),
    Row("... + range search", "qvd", _with(_RANGE, "static"), bits=_STEPS),
    Row("... + bias correction", "qvd", _with(_BIAS, "static"), bits=_LOW),
    Row("QVD static", "qvd", _with(_QVD, "static"), headline=True),
    Row("QVD static + rotation", "qvd", _with(_ROTATED, "static"), headline=True),
    # One per range of timesteps.
    Row("min-max per range of timesteps", "baseline", _with(_PLAIN, "static_bucket")),
    Row("QVD static_bucket", "qvd", _with(_QVD, "static_bucket")),
    Row("QVD static_bucket + rotation", "qvd", _with(_ROTATED, "static_bucket"), bits=_LOW),
    # One per video frame.
    Row("min-max per frame", "baseline", _with(_PLAIN, "static_frame")),
    Row("QVDConfig.paper()", "qvd", _paper(), headline=True),
    Row("QVD static_frame", "qvd", _with(_QVD, "static_frame")),
    Row("QVD static_frame + rotation", "qvd", _with(_ROTATED, "static_frame"), bits=_LOW),
    # One per token, measured while running.
    Row("per token", "baseline", _with(_PLAIN, "token"), calibrated=False, headline=True),
    Row("SmoothQuant per token", "baseline", _with(_PLAIN, "token"), edit=smoothquant, headline=True),
    Row("QVD without HTDQ", "qvd", _with({**_QVD, "temporal_quantizer": "uniform"}, "token"), bits=("W6A6", "W4A6")),
    Row("QVD data-free", "qvd", _with(_QVD, "token"), calibrated=False),
    Row("QVD, rounded to nearest", "qvd", _with(_BIAS, "token"), bits=_LOW),
    Row("QVD", "qvd", _with(_QVD, "token"), headline=True),
    Row("QVD + rotation", "qvd", _with(_ROTATED, "token"), headline=True),
    *(_peer_row(peer) for peer in PEERS),
)

ABLATIONS: dict[str, tuple[str, ...]] = {
    "static": (
        "min-max",
        "min-max + HTDQ",
        "... + shift",
        "... + scale",
        "... + range search",
        "... + bias correction",
        "QVD static",
        "QVD static + rotation",
    ),
    "token": ("per token", "QVD data-free", "QVD, rounded to nearest", "QVD", "QVD + rotation"),
}
"""Rows in which each adds one thing to the one before it; "QVD static" and "QVD" add GPTQ rounding (below 8 bits)."""


def rows_of(bits: str, patterns: tuple[str, ...] = ("*",)) -> list[Row]:
    """The rows of the table of `bits` ("FP" for the references) that one of `patterns` chooses.

    A pattern is a name with "*" for anything, a kind, or "headline" for the short list.
    """
    return [row for row in ROWS if bits in row.bits and any(_chosen(row, pattern) for pattern in patterns)]


def _chosen(row: Row, pattern: str) -> bool:
    return fnmatch(row.name, pattern) or row.kind == pattern or (pattern == "headline" and row.headline)
