"""What a report says, as plain data: frozen dataclasses of numbers and names, and their JSON form."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from qvd_core.errors import QVDError

REPORT_VERSION = 1
SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. None stands for what is not known, as all figures are without calibration.

    block, part: where it is: "blocks.3" and "attn1.to_q"; block is "" outside the repeated blocks.
    kind: linear, conv2d, conv3d or temporal; "" where only the scales are known. shape: of the float weight.
    activation: how its inputs are quantized, in words. bytes: of all its tensors once quantized, 0 when not known.
    sqnr_db: of the layer's own output; coverage: share of the levels that the mean channel uses; both also before SCRI.
    end_sqnr_db: of the model's output with this layer alone quantized.
    """

    name: str
    block: str
    part: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int
    activation: str
    bytes: int
    sqnr_db: float | None = None
    sqnr_db_before: float | None = None
    coverage: float | None = None
    coverage_before: float | None = None
    end_sqnr_db: float | None = None


@dataclass(frozen=True)
class ChannelRanges:
    """Ranges of a layer's input channels, each a share of the largest magnitude in the tensor.

    before, after: (minimum, maximum) of the same channels before and after shift and scale, the widest first;
        of many channels, some that are evenly spaced in that order. channels: how many there are.
    rotated: a rotation behind shift and scale mixes the channels further, which these ranges do not show.
    """

    layer: str
    channels: int
    before: tuple[tuple[float, float], ...]
    after: tuple[tuple[float, float], ...]
    rotated: bool = False


@dataclass(frozen=True)
class RangeDrift:
    """How the range of a layer's transformed input moves while sampling.

    timesteps: ascending. reach: largest magnitude at each, as a share of the largest at all.
    """

    layer: str
    timesteps: tuple[float, ...]
    reach: tuple[float, ...]


@dataclass(frozen=True)
class TemporalQuantizerReport:
    """One quantizer on one set of temporal features: TDScore, TDR, TDC, COL (METHOD section 2).

    deployed: the model uses it. distances: d_ij for i < j, row by row; empty where not known.
    """

    name: str
    deployed: bool
    td_score: float
    tdr: float
    tdc: float
    col: float
    distances: tuple[float, ...] = ()


@dataclass(frozen=True)
class TemporalReport:
    """One set of temporal features and the quantizers that were tried on it.

    layers: the projections that read it. timesteps: in sampling order; empty where not known. bits: of a code.
    td_score, distances: of the features in full precision.
    """

    layers: tuple[str, ...]
    bits: int
    td_score: float
    timesteps: tuple[float, ...] = ()
    distances: tuple[float, ...] = ()
    quantizers: tuple[TemporalQuantizerReport, ...] = ()

    @property
    def deployed(self) -> TemporalQuantizerReport | None:
        return next((quantizer for quantizer in self.quantizers if quantizer.deployed), None)


@dataclass(frozen=True)
class Report:
    """Everything a report says of one quantized model.

    settings: the QuantSpec. kept: layer -> why it stays in full precision.
    float_bytes, int8_bytes: of the whole model before and after; 0 where not known.
    quality, speed: figures of the caller by name; None for one that is infinite (identical videos).
    calibrated_on: what the scales say of their origin; empty without calibration.
    """

    model: str
    family: str
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    float_bytes: int = 0
    int8_bytes: int = 0
    quality: Mapping[str, float | None] = field(default_factory=dict)
    speed: Mapping[str, float | None] = field(default_factory=dict)
    calibrated_on: Mapping[str, Any] = field(default_factory=dict)
    ranges: tuple[ChannelRanges, ...] = ()
    drift: tuple[RangeDrift, ...] = ()
    temporal: tuple[TemporalReport, ...] = ()
    version: int = REPORT_VERSION

    def mean(self, figure: str) -> float | None:
        """Mean of one of `LayerReport`'s figures over the layers that have it; None when none has."""
        values = [value for layer in self.layers if (value := getattr(layer, figure)) is not None]
        return sum(values) / len(values) if values else None

    def worst(self, count: int) -> list[LayerReport]:
        """The layers whose own output has the largest error, the worst first."""
        measured = [layer for layer in self.layers if layer.sqnr_db is not None]
        return sorted(measured, key=lambda layer: (layer.sqnr_db, layer.name))[:count]

    def with_sizes(self, float_bytes: int, int8_bytes: int) -> Report:
        """The same report with the sizes of the whole model."""
        return replace(self, float_bytes=float_bytes, int8_bytes=int8_bytes)

    def to_json(self) -> str:
        """Strict JSON: neither NaN nor infinity."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`. Raises QVDError for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise QVDError(f"this is not the JSON of a report ({error}): write the report again.") from None
        version = values.get("version") if isinstance(values, dict) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise QVDError("this JSON is not a report of QVD: it has no version.")
        if version > REPORT_VERSION:
            raise QVDError(f"this report has version {version}, this QVD reads up to {REPORT_VERSION}: update QVD.")
        return from_plain(cls, values)


def rounded(value: float | None) -> float | None:
    """To the digits a report keeps; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def from_plain(kind: Any, value: Any, where: str = "report") -> Any:
    """`value`, made of what JSON has, as a `kind`: a dataclass of this file, or the type of one of its fields.

    Raises QVDError, naming the place, for a value of another type.
    """
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _dataclass_from(kind, value, where)
    if origin is types.UnionType:
        return None if value is None else from_plain(get_args(kind)[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        inner = get_args(kind)
        if inner[-1] is not Ellipsis and len(inner) != len(value):
            raise QVDError(f"{where} has {len(value)} values, expected {len(inner)}: the report is damaged.")
        return tuple(from_plain(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        inner = get_args(kind)[1]
        return {key: item if inner is Any else from_plain(inner, item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise QVDError(
        f"{where} is {type(value).__name__} {str(value)[:40]!r}: the report is damaged, or not one of QVD's."
    )


def _dataclass_from(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise QVDError(f"{where} is {type(value).__name__}, expected an object: the report is damaged.")
    types_of, known = get_type_hints(kind), {item.name for item in fields(kind)}
    if set(value) - known:
        raise QVDError(f"{where} has the unknown entry {min(set(value) - known)!r}: the report is damaged.")
    try:
        return kind(**{key: from_plain(types_of[key], item, f"{where}.{key}") for key, item in value.items()})
    except TypeError as error:
        raise QVDError(f"{where} is incomplete ({error}): the report is damaged.") from None
