"""`QVDConfig`: what a user writes, in every place where diffusers asks for a quantization config."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from qvd_core.errors import QVDError
from qvd_core.presets import PRESETS
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin as _TransformersConfigMixin
except ImportError:  # transformers is optional: without it there is no text encoder to hand a config to

    class _TransformersConfigMixin:  # type: ignore[no-redef]
        """Stands in for the base class that only transformers asks for."""


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of the entry written to config.json; raised when an older reader would compute something else."""

ATTENTION_NOTE = "_attention"
"""Where config.json keeps `attention`."""

DENOISERS = ("transformer", "transformer_2", "unet")
"""Pipeline components that are quantized unless the user names others."""

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(QuantSpec))


class QVDMethod(str, Enum):
    """The method name; an enum because diffusers reads `quant_method.value` while loading."""

    QVD = "qvd"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(repr=False)
class QVDConfig(QuantizationConfigMixin, _TransformersConfigMixin, PipelineQuantizationConfig):
    """Quantize a video diffusion model to int8 while it is loaded.

    The same object works for a pipeline (`DiffusionPipeline.from_pretrained(..., quantization_config=QVDConfig())`),
    for one model, and as an entry of `PipelineQuantizationConfig(quant_mapping={"transformer": QVDConfig()})`.
    It is never changed by a load; every component records its result in a copy.

    weight_bits ... backend: see `qvd_core.QuantSpec`.
    scales: calibrated scales, as returned by `qvd_diffusers.calibrate`, or the path of the file they were saved to; for
        a pipeline with several denoisers a dict of them by component. Without them the quantization is data-free: no
        shift and no scale per channel, and dynamic activations only.
    components: at pipeline level, the components to quantize; default: the denoisers the pipeline has.
    attention: None for the model's own attention; "auto" for 8-bit attention by an installed SageAttention, wherever it
        can run; or the name of a diffusers attention backend. See `qvd_diffusers.set_attention`.
    compute_dtype: type of everything that stays in floating point when `torch_dtype` is not given; default float32.

    Raises QVDError (a ValueError) for settings that do not exist or do not fit together.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    activation: str = "token"
    buckets: int = 8
    shift: bool = True
    scale: str = "search"
    range: str = "search"
    rotate: bool = False
    rounding: str = "auto"
    temporal: str = "table"
    temporal_quantizer: str = "auto"
    bias_correction: bool = True
    portable: bool = False
    auto_keep: float | None = None
    modules_to_not_convert: Sequence[str] | None = None
    backend: str = "auto"
    scales: Scales | str | os.PathLike[str] | Mapping[str, Scales | str | os.PathLike[str]] | None = None
    components: Sequence[str] | None = None
    compute_dtype: torch.dtype | str | None = None
    attention: str | None = None
    layers: dict[str, Any] | None = dataclasses.field(default=None, init=False)
    """The plan of a quantized model, written to config.json so that a reload needs nothing else."""
    component: str | None = dataclasses.field(default=None, init=False, compare=False)
    """The pipeline component this copy is for, where it is known; its scales must be of that one."""
    version: int = dataclasses.field(default=FORMAT_VERSION, init=False)
    quant_method: QVDMethod = dataclasses.field(default=QVDMethod.QVD, init=False)

    def __post_init__(self) -> None:
        # Own tuples: neither the caller's list nor ours may change through the other.
        names: Any = self.modules_to_not_convert or ()
        if isinstance(names, Iterable) and not isinstance(names, str):
            names = tuple(names)
        self.modules_to_not_convert = names
        self.components = _checked_components(self.components)
        self.compute_dtype = _checked_dtype(self.compute_dtype)
        self.attention = checked_attention(self.attention)
        _check_scales(self.scales)
        try:
            self.spec  # noqa: B018  (building it validates every quantization setting)
        except QVDError:
            raise
        except ValueError as error:
            raise QVDError(f"QVDConfig: {error}") from None

    @property
    def spec(self) -> QuantSpec:
        """The quantization settings alone, as the core takes them."""
        return QuantSpec(**{name: getattr(self, name) for name in SPEC_FIELDS})

    @classmethod
    def paper(cls, **overrides: Any) -> QVDConfig:
        """QVD as we reconstruct it: static activations per video frame, shift and one integrated range, power-of-two
        temporal codes, plain rounding.

        Needs calibrated scales. Not the most accurate choice: `log2` codes do not get finer with more bits.
        """
        return cls(**{**PRESETS["paper"], **overrides})

    @classmethod
    def fast(cls, **overrides: Any) -> QVDConfig:
        """The least work while sampling: one dynamic scale per token, no shift or scale per channel; needs no data."""
        return cls(**{**PRESETS["fast"], **overrides})

    @classmethod
    def best(cls, **overrides: Any) -> QVDConfig:
        """The most accurate choice, at the price of some time while calibrating, loading and sampling.

        Dynamic scales on top of a calibrated shift, scale and rotation, and error-compensating rounding. Needs
        calibrated scales.
        """
        return cls(**{**PRESETS["best"], **overrides})

    def load_scales(self) -> Scales | None:
        """The scales of one model, read where they are given as a path. Raises QVDError when they are several."""
        if isinstance(self.scales, Mapping):
            names = ", ".join(self.scales)
            raise QVDError(f"these scales are for the components {names} of a pipeline: for one model pass its own.")
        if self.scales is None:
            return None
        scales = self.scales if isinstance(self.scales, Scales) else Scales.load(Path(self.scales))
        calibrated = scales.calibrated_on.get("component")
        if self.component is not None and calibrated not in (None, self.component):
            raise QVDError(
                f"these scales were calibrated on {calibrated}, not on {self.component}: calibrate that, too."
            )
        return scales

    def copy(self) -> QVDConfig:
        """An independent config; the calibrated scales are shared, because nothing writes to them."""
        duplicate = copy.copy(self)
        duplicate.layers = copy.deepcopy(self.layers)
        return duplicate

    def to_dict(self) -> dict[str, Any]:
        """JSON types only. The scales are left out: what a model needs of them is in its weights file."""
        origin = {"quant_method": self.quant_method.value, "version": self.version}
        entry: dict[str, Any] = {**origin, **self.spec.to_dict()}
        if self.compute_dtype is not None:
            entry["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        if self.components is not None:
            entry["components"] = list(self.components)
        if self.attention is not None:
            # A note: a reader that does not know it computes the same with the model's own attention.
            entry[ATTENTION_NOTE] = self.attention
        if self.layers is not None:
            entry["layers"] = copy.deepcopy(self.layers)
        return entry

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without what equals the defaults and without the list of layers: short enough for a log line."""
        defaults = {**QuantSpec().to_dict(), "version": FORMAT_VERSION}
        return {
            key.removeprefix("_"): value
            for key, value in self.to_dict().items()
            if key != "layers" and value != defaults.get(key)
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`.

        config_dict: a mapping as in config.json; `quant_method` may be missing. Not changed.
        return_unused_kwargs, kwargs: further settings and a second return value, as diffusers and transformers ask for.
        Raises QVDError for a newer version, for another method, and for an unknown setting that is switched on.
        """
        entry = dict(config_dict)
        recorded = entry.pop(ATTENTION_NOTE, None)
        _check_origin(entry.pop("quant_method", QVDMethod.QVD), entry.pop("version", FORMAT_VERSION))
        layers = entry.pop("layers", None)
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        entry.update({key: kwargs.pop(key) for key in list(kwargs) if key in known})
        _check_unknown({key: value for key, value in entry.items() if key not in known}, known)
        config = cls(**{key: value for key, value in entry.items() if key in known})
        if layers is not None and not isinstance(layers, Mapping):
            raise QVDError(f"quantization_config: 'layers' is a {type(layers).__name__}; the file is damaged.")
        config.layers = copy.deepcopy(dict(layers)) if layers is not None else None
        if isinstance(recorded, str):
            config.attention = recorded  # unchecked: another diffusers may know other backends
        return (config, kwargs) if return_unused_kwargs else config

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        shown = [f"{key}={value!r}" for key, value in self.to_diff_dict().items() if key != "quant_method"]
        if self.scales is not None:
            shown.append(f"scales={_shown_scales(self.scales)}")
        if self.layers is not None:
            shown.append(f"<{len(self.layers)} recorded layers>")
        return f"QVDConfig({', '.join(shown)})"

    # What diffusers reads of a pipeline-level config. `PipelineQuantizationConfig.__init__` is not called: it wants a
    # backend's name and a dict of arguments, and this object is already the parsed form of both.
    quant_backend = None
    quant_mapping = None
    is_granular = False

    @property
    def components_to_quantize(self) -> list[str] | None:
        """The components named by the user, under the name diffusers checks for misspellings."""
        return None if self.components is None else list(self.components)

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> QVDConfig | None:
        """The config of one pipeline component, or None when it stays as it is. Called by diffusers per component."""
        if module_name is None or module_name not in (self.components or DENOISERS):
            return None
        if not is_diffusers:
            return self._for_text_encoder(module_name)
        config = self.copy()
        config.component = module_name
        if isinstance(self.scales, Mapping):
            if module_name not in self.scales:
                known = ", ".join(self.scales)
                raise QVDError(
                    f"scales are given for {known}, but {module_name} is to be quantized, too: calibrate it."
                )
            config.scales = self.scales[module_name]
        return config

    def _for_text_encoder(self, name: str) -> QVDConfig:
        """What this config says about a text encoder: calibrated settings are about the denoisers beside it."""
        if isinstance(self.scales, Mapping) and name in self.scales:
            raise QVDError(
                f"scales are given for {name}, a text encoder, which is quantized without any: leave them out."
            )
        config = self.copy()
        if self.spec.is_static:
            logger.info(
                "%s is a text encoder: one dynamic activation scale per token, not activation=%r.",
                name,
                self.activation,
            )
        config.scales, config.auto_keep, config.attention = None, None, None
        config.activation, config.rounding, config.rotate = "token", "auto", False
        return config


def text_encoder_refusal(component: str | None = None) -> str:
    """The one message for a transformers model that is in memory already, where only denoisers can be quantized."""
    subject = f"component {component!r}" if component else "this component"
    return (
        f"{subject} is a transformers model, and QVD quantizes those only while they are loaded: pass "
        "quantization_config=QVDConfig() to its from_pretrained, or name it in the pipeline's "
        "QVDConfig(components=...)."
    )


def _checked_components(components: Any) -> tuple[str, ...] | None:
    if components is None:
        return None
    names = (components,) if isinstance(components, str) else components
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise QVDError(f"components must be names of pipeline components, e.g. ['transformer'], got {components!r}.")
    return tuple(names)


def _checked_dtype(dtype: Any) -> torch.dtype | None:
    value: Any = COMPUTE_DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if value is None or value in COMPUTE_DTYPES.values():
        return value
    raise QVDError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}.")


def checked_attention(attention: Any) -> str | None:
    """`attention` in lower case when it is None, "auto" or a name diffusers knows. Raises QVDError otherwise."""
    known = [backend.value for backend in AttentionBackendName]
    if attention is None:
        return None
    name = attention.value if isinstance(attention, AttentionBackendName) else attention
    if isinstance(name, str) and name.lower() in ("auto", *known):
        return name.lower()
    raise QVDError(f"attention must be None, 'auto' or a diffusers backend ({', '.join(known)}), got {attention!r}.")


def _shown_scales(scales: Any) -> str:
    if isinstance(scales, Mapping):
        return "{" + ", ".join(f"{name!r}: {_shown_scales(item)}" for name, item in scales.items()) + "}"
    return "<Scales>" if isinstance(scales, Scales) else repr(os.fspath(scales))


def _check_scales(scales: Any) -> None:
    if isinstance(scales, str) and scales == "auto":
        raise QVDError(
            "scales='auto' is not supported, because a config cannot sample: run "
            "`scales = qvd_diffusers.calibrate(pipe, prompts, ...)` (it is cached) and pass QVDConfig(scales=scales)."
        )
    each = list(scales.values()) if isinstance(scales, Mapping) and scales else [scales]
    for item in each:
        if not (item is None and item is scales) and not (isinstance(item, (Scales, os.PathLike, str)) and item):
            raise QVDError(f"scales must be None, a path or the result of calibrate, got {type(item).__name__}.")


def _check_origin(method: Any, version: Any) -> None:
    if method != QVDMethod.QVD:
        raise QVDError(f"quantization_config is of method {str(method)!r}, not 'qvd'.")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise QVDError(f"quantization_config: version is {version!r}, not a positive integer; the file is damaged.")
    if version > FORMAT_VERSION:
        raise QVDError(
            f"quantization_config: version {version} was written by a newer QVD, this one reads up to "
            f"{FORMAT_VERSION}: update the qvd package."
        )


def _check_unknown(unknown: Mapping[str, Any], known: set[str]) -> None:
    """A note (leading underscore) or a setting that is off changes no number; anything else might."""
    active = sorted(key for key, value in unknown.items() if not key.startswith("_") and value not in (None, False))
    if active:
        raise QVDError(
            f"quantization_config: unknown setting(s) {', '.join(active)}; known are {', '.join(sorted(known))}."
        )
