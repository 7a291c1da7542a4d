"""What a quantized MODEL knows about itself, beside its layers: it goes with every clone and into its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qvd_core.errors import QVDError
from qvd_core.spec import QuantSpec
from qvd_nodes._comfy import ModelPatcher

KEY = "qvd"


@dataclass(frozen=True)
class Record:
    """How a MODEL came to be quantized.

    family: name of the registry's entry, or "generic". float_bytes: of the denoiser before.
    layers_in_all: linear and convolution layers of the denoiser, kept ones included.
    report: layer -> figures of the calibration; empty without. calibrated_on: what the scales were found on.
    file_metadata: of the file the float model came from; some models are described there alone (LTX-Video).
    """

    spec: QuantSpec
    family: str
    float_bytes: int
    layers_in_all: int
    report: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calibrated_on: Mapping[str, Any] = field(default_factory=dict)
    file_metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        return bool(self.report or self.calibrated_on)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; without the metadata, which a file has of its own."""
        return {
            "spec": self.spec.to_dict(),
            "family": self.family,
            "float_bytes": self.float_bytes,
            "layers_in_all": self.layers_in_all,
            "report": {name: dict(figures) for name, figures in self.report.items()},
            "calibrated_on": dict(self.calibrated_on),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file_metadata: Mapping[str, str]) -> Record:
        """Inverse of `to_dict`. Raises QVDError for anything else."""
        try:
            return cls(
                spec=QuantSpec.from_dict(values["spec"]),
                family=str(values["family"]),
                float_bytes=int(values["float_bytes"]),
                layers_in_all=int(values["layers_in_all"]),
                report={
                    str(name): {str(key): float(figure) for key, figure in figures.items()}
                    for name, figures in values["report"].items()
                },
                calibrated_on=dict(values["calibrated_on"]),
                file_metadata=dict(file_metadata),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise QVDError(
                f"the file's description is damaged, or from a newer QVD ({error}): save it again."
            ) from error


def record_of(patcher: ModelPatcher) -> Record:
    """What a quantized MODEL knows about itself. Raises QVDError for a MODEL that QVD has not quantized."""
    record = patcher.get_attachment(KEY)
    if not isinstance(record, Record):
        raise QVDError("this MODEL is not quantized by QVD: connect the output of QVD Quantize Model.")
    return record


def attach(patcher: ModelPatcher, record: Record) -> None:
    """Make the record part of the MODEL and of all its clones."""
    patcher.set_attachments(KEY, record)


def metadata_of_source(patcher: ModelPatcher) -> dict[str, str]:
    """The metadata of the file a float MODEL was loaded from; empty where that is unknown."""
    known = patcher.cached_patcher_init
    path = known[1][0] if known and known[1] else None
    if not isinstance(path, str) or not Path(path).is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):  # a .ckpt, or gone by now
        return {}
