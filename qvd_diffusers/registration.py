"""Makes `quant_method: "qvd"` known to diffusers, and to transformers where it is installed."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers import auto as diffusers_auto

from qvd_core.errors import QVDError
from qvd_diffusers.backend_name import BackendConfig
from qvd_diffusers.config import QVDMethod
from qvd_diffusers.lora import watch_adapters
from qvd_diffusers.quantizer import QVDQuantizer


def register() -> None:
    """Enter the config and the quantizer under "qvd", and let adapters merge. Calling it again changes nothing.

    diffusers has no registration function; its two mappings are plain dicts, and adding an entry replaces nothing.
    """
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QVDMethod.QVD.value] = BackendConfig
    diffusers_auto.AUTO_QUANTIZER_MAPPING[QVDMethod.QVD.value] = QVDQuantizer
    _register_with_transformers()
    watch_adapters()


def _register_with_transformers() -> None:
    """Text encoders are transformers models; `PipelineQuantizationConfig(quant_backend="qvd")` looks there, too."""
    try:
        from transformers.quantizers import auto as transformers_auto
    except ImportError:
        return
    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QVDMethod.QVD.value] = BackendConfig
    transformers_auto.AUTO_QUANTIZER_MAPPING[QVDMethod.QVD.value] = _text_quantizer()


def _text_quantizer() -> type[Any]:
    """The quantizer for this version of transformers."""
    try:
        from qvd_diffusers.text_encoder import QVDTextQuantizer
    except ImportError:  # the loader it hooks into is younger
        return TextEncoderRefusal
    return QVDTextQuantizer


class TextEncoderRefusal:
    """Answers a request for a quantized text encoder with one clear error, where transformers is too old for one.

    Without it transformers either fails with a list of other methods or, for a checkpoint, only warns and computes
    with int8 codes as if they were weights.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        raise QVDError(
            "this component is a transformers model, and QVD quantizes those with transformers 5.23 or newer. "
            "Update transformers, or leave the component out: pass QVDConfig() itself, or name the denoiser, "
            "e.g. components_to_quantize=['transformer']."
        )
