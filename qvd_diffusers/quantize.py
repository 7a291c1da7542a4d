"""`quantize`: a model or a pipeline that is in memory already, instead of while it is loaded."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from qvd_core.checks import cast_finite, check_finite
from qvd_core.convert import quantize_model
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_core.scales import Scales
from qvd_diffusers.attention import AUTO, require_backend
from qvd_diffusers.config import COMPUTE_DTYPES, QVDConfig, text_encoder_refusal
from qvd_diffusers.quantizer import QVDQuantizer, refuse_image_unet, warn_of_other_settings
from qvd_diffusers.residence import refuse_out_of_reach
from qvd_diffusers.sampling import find_denoisers

Quantizable = TypeVar("Quantizable", ModelMixin, DiffusionPipeline)


def quantize(model_or_pipeline: Quantizable, config: QVDConfig | None = None) -> Quantizable:
    """Quantize a float diffusers model, or the denoisers of a pipeline, in place, and return it.

    The result is what `from_pretrained(..., quantization_config=config)` gives for the same weights: `save_pretrained`
    writes a folder that loads by itself. Use it for models that no folder holds as they are: made with `from_config`,
    merged with a LoRA, or put together while loading, as AnimateDiff's UNet is. Needs the full-precision model in
    memory; its layers are replaced one by one.

    config: as for `from_pretrained`, with `scales` a dict by component where there are several denoisers, and
        `components` to choose among a pipeline's; default `QVDConfig()`.

    Raises QVDError, with every component as it was, for models of other libraries, models that are quantized or
    offloaded, hold an adapter or NaN, and for scales of another model.
    """
    config = QVDConfig() if config is None else config
    if not isinstance(config, QVDConfig):
        raise QVDError(f"config must be a QVDConfig, got {type(config).__name__}.")
    if config.attention not in (None, AUTO):
        require_backend(config.attention)
    jobs = [_Job(model, own) for model, own in _chosen(model_or_pipeline, config)]
    for job in jobs:
        job.check()
    for job in jobs:
        job.run()
    return model_or_pipeline


def _chosen(target: Any, config: QVDConfig) -> list[tuple[nn.Module, QVDConfig]]:
    """The models to quantize, each with its own config."""
    if not isinstance(target, DiffusionPipeline):
        return [(target, config.copy())]
    if config.components is None:
        models = find_denoisers(target)
    else:
        models = {name: find_denoisers(target, name)[name] for name in config.components}
    chosen = []
    for name, model in models.items():
        _require_diffusers_model(model, name)
        own = config._resolve_quant_config(is_diffusers=True, module_name=name)
        assert own is not None
        chosen.append((model, own))
    return chosen


class _Job:
    """One model that is to be quantized."""

    def __init__(self, model: Any, config: QVDConfig):
        _require_diffusers_model(model)
        self.model = model
        self.config = config
        self.scales: Scales | None = config.load_scales()

    def check(self) -> None:
        """Raise QVDError for whatever would stop the conversion; changes nothing."""
        _refuse_quantized(self.model)
        refuse_out_of_reach(self.model)
        refuse_image_unet(self.model)
        encoding = Encoding.of(self.model, self.config.spec, self.scales)
        layers = [self.model.get_submodule(name) for name in encoding.plan]
        self.dtype = Counter(layer.weight.dtype for layer in layers).most_common(1)[0][0]
        _check_dtype(self.dtype, self.config)
        for name, layer in zip(encoding.plan, layers, strict=True):
            encoding.check(name, layer.weight, layer.bias)
        quantized = {id(tensor) for layer in layers for tensor in layer.parameters()}
        for name, tensor in self.model.named_parameters():
            if id(tensor) not in quantized:
                check_finite(name, encoding.edit(name, tensor.detach()))

    def run(self) -> None:
        """Convert the model, and make it what a loaded one is."""
        if self.scales is not None:
            warn_of_other_settings(self.scales.spec, self.config.spec)
        quantize_model(self.model, self.config.spec, self.scales)
        for layer in self.model.modules():
            if isinstance(layer, QuantizedLayer) and layer.compute_dtype != self.dtype:
                _compute_in(layer, self.dtype)
        QVDQuantizer(self.config).adopt(self.model, self.dtype)


def _require_diffusers_model(model: Any, component: str | None = None) -> None:
    if isinstance(model, ModelMixin):
        return
    if type(model).__module__.startswith("transformers."):
        raise QVDError(text_encoder_refusal(component))
    if isinstance(getattr(model, "_orig_mod", None), ModelMixin):
        raise QVDError(f"this {type(model._orig_mod).__name__} is compiled: quantize it first, then torch.compile it.")
    raise QVDError(
        f"expected a diffusers model or pipeline, got {type(model).__name__}: "
        "for other torch models there is qvd_core.quantize_model."
    )


def _refuse_quantized(model: Any) -> None:
    """Some backends leave no trace in the weights, only this mark; the core recognizes the others by their types."""
    if getattr(model, "is_quantized", False):
        method = getattr(model.quantization_method, "value", model.quantization_method)
        raise QVDError(f"this {type(model).__name__} is quantized already, by {method}: load it in full precision.")


def _check_dtype(dtype: torch.dtype, config: QVDConfig) -> None:
    if dtype not in COMPUTE_DTYPES.values():
        raise QVDError(f"the model is {dtype}: convert it to one of {', '.join(COMPUTE_DTYPES)} before quantizing.")
    if config.compute_dtype not in (None, dtype):
        raise QVDError(
            f"compute_dtype={config.compute_dtype} is for loading, and this model is in memory as {dtype}: "
            "call .to(dtype) before quantizing, or leave compute_dtype out."
        )


def _compute_in(layer: QuantizedLayer, dtype: torch.dtype) -> None:
    """Give one layer the type of the others; a class may keep some in float32, but saved they would not be known."""
    layer.compute_dtype = dtype
    if layer.bias is not None:
        layer.bias = nn.Parameter(cast_finite("bias", layer.bias.detach(), dtype), requires_grad=False)
