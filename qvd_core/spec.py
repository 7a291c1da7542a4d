"""`QuantSpec`: every choice of a quantization in one frozen, validated, serializable object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Activation = Literal["token", "static"]
ScaleMode = Literal["search", "smooth", "none"]
TemporalMode = Literal["table", "online", "none"]
TemporalQuantizerName = Literal["auto", "logk", "log2", "power", "mix", "uniform", "channel"]
BackendName = Literal["auto", "reference", "emulated"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "scale": get_args(ScaleMode),
    "temporal": get_args(TemporalMode),
    "temporal_quantizer": get_args(TemporalQuantizerName),
    "backend": get_args(BackendName),
}
BITS = range(4, 9)


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize to, and how.

    weight_bits, activation_bits: 4 to 8; below 8 the codes still live in int8 containers.
    activation: "token" measures one scale per token (per image for convolutions) while running;
        "static" uses one calibrated scale per layer (layers that read the prompt stay dynamic).
    shift, scale: SCRI (METHOD section 3); both need calibrated scales, without them they are the identity.
    temporal, temporal_quantizer: HTDQ (METHOD section 2). "table" remembers the projection of every timestep,
        "online" computes it each time, "none" leaves temporal features unquantized (their weights are still int8).
    bias_correction: fold with the quantized weight around the calibrated channel mean (METHOD 3.7).
    portable: allow only what folds into ordinary tensors, so that plain int8 loaders lose nothing.
    modules_to_not_convert: layer names, or whole-part prefixes of them, that stay in full precision.
    backend: which implementation of the int8 operators runs; "auto" picks the fastest exact one.

    Raises ValueError for any value outside these sets.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    activation: Activation = "token"
    shift: bool = True
    scale: ScaleMode = "search"
    temporal: TemporalMode = "table"
    temporal_quantizer: TemporalQuantizerName = "auto"
    bias_correction: bool = True
    portable: bool = False
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
        for name in ("shift", "bias_correction", "portable"):
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
        return not self.portable and (self.shift or self.scale != "none")

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
