"""`QuantSpec`: every choice of a quantization in one frozen, validated, serializable object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Activation = Literal["token", "static", "static_bucket", "static_frame"]
ScaleMode = Literal["search", "threshold", "smooth", "none"]
RangeMode = Literal["search", "minmax", "quantile"]
Rounding = Literal["auto", "nearest", "gptq"]
TemporalMode = Literal["table", "online", "none"]
TemporalQuantizerName = Literal["auto", "logk", "log2", "power", "mix", "uniform", "channel"]
BackendName = Literal["auto", "reference", "emulated", "cpu", "int_mm", "triton", "weight_only", "comfy_kitchen"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "scale": get_args(ScaleMode),
    "range": get_args(RangeMode),
    "rounding": get_args(Rounding),
    "temporal": get_args(TemporalMode),
    "temporal_quantizer": get_args(TemporalQuantizerName),
    "backend": get_args(BackendName),
}
BITS = range(4, 9)
MOST_BUCKETS = 32


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize to, and how.

    weight_bits, activation_bits: 4 to 8; 4-bit weights are stored two per byte, the rest in int8 containers. The
        weights of temporal projections stay int8: they are read once per timestep, not once per token.
    activation: "token" measures one scale per token (per image for convolutions) while running. The others use
        calibrated scales: "static" one per layer, "static_bucket" one per range of timesteps, "static_frame" one per
        video frame (where the layer knows its frames). Layers that read the prompt stay dynamic in all of them.
    buckets: the most ranges of timesteps a "static_bucket" layer has.
    shift, scale: SCRI (METHOD section 3); both need calibrated scales, without them they are the identity. "threshold"
        brings wide channels to one range [R], "smooth" weighs range against weights [O], "search" tries both.
    range: what a calibrated scale has to hold. "minmax" every value seen, "quantile" all but the outermost values of
        each channel, "search" the share of the seen range that costs the least output error.
    rotate: let SCRI also try a blockwise Hadamard rotation of the channels, which spreads outliers. [O]
    rounding: "nearest", or "gptq": each weight column's rounding error is made good by the columns after it, judged on
        a sample of the layer's inputs. "auto" is "gptq" below 8 bits where there are calibrated scales.
    temporal, temporal_quantizer: HTDQ (METHOD section 2). "table" remembers the projection of every timestep,
        "online" computes it each time, "none" leaves temporal features unquantized (their weights are still int8).
    bias_correction: fold with the quantized weight around the calibrated channel mean (METHOD 3.7).
    portable: allow only what folds into ordinary tensors, so that plain int8 loaders lose nothing.
    auto_keep: keep the layers that calibration found most sensitive in full precision: those that fit into a share of
        the weights (below 1), or every layer that alone brings the model's output below so many dB (1 and above).
    modules_to_not_convert: layer names, or whole parts of them ("blocks.0", "to_k"), that stay in full precision.
    backend: which implementation of the int8 operators runs; "auto" picks the fastest exact one for each device and
        shape, "weight_only" multiplies unquantized activations with decoded weights (for its memory alone).

    Raises ValueError for any value outside these sets.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    activation: Activation = "token"
    buckets: int = 8
    shift: bool = True
    scale: ScaleMode = "search"
    range: RangeMode = "search"
    rotate: bool = False
    rounding: Rounding = "auto"
    temporal: TemporalMode = "table"
    temporal_quantizer: TemporalQuantizerName = "auto"
    bias_correction: bool = True
    portable: bool = False
    auto_keep: float | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise ValueError(f"{name} must be an integer from {BITS[0]} to {BITS[-1]}, got {bits!r}.")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if isinstance(self.buckets, bool) or not isinstance(self.buckets, int) or not 1 <= self.buckets <= MOST_BUCKETS:
            raise ValueError(f"buckets must be an integer from 1 to {MOST_BUCKETS}, got {self.buckets!r}.")
        if self.auto_keep is not None and not _is_positive(self.auto_keep):
            raise ValueError(
                "auto_keep must be a share of the weights between 0 and 1, a number of dB from 1 on, or None; "
                f"got {self.auto_keep!r}."
            )
        for name in ("shift", "rotate", "bias_correction", "portable"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        names = self.modules_to_not_convert
        listed = () if names is None else tuple(names) if isinstance(names, Iterable) else (names,)
        if isinstance(names, str) or not all(isinstance(name, str) and name for name in listed):
            raise ValueError(f"modules_to_not_convert must be a sequence of layer names, got {names!r}.")
        object.__setattr__(self, "modules_to_not_convert", listed)

    @property
    def transforms_inputs(self) -> bool:
        """Whether layers may carry an input shift and scale of their own."""
        return self.shift or self.scale != "none" or self.rotate

    @property
    def compensates_rounding(self) -> bool:
        """Whether weights are rounded with error compensation, given a sample of their inputs."""
        return self.rounding == "gptq" or (self.rounding == "auto" and self.weight_bits < 8)

    @property
    def is_static(self) -> bool:
        """Whether activation scales come from calibration."""
        return self.activation != "token"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {**asdict(self), "modules_to_not_convert": list(self.modules_to_not_convert)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """Inverse of `to_dict`; raises ValueError for a field this version does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown setting(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        return cls(**values)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value < float("inf")
