"""Makes `quant_method: "qvd"` known to diffusers, and to transformers where it is installed."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers import auto as diffusers_auto

from qvd_core.errors import QVDError
from qvd_diffusers.config import QVDConfig, QVDMethod, text_encoder_refusal
from qvd_diffusers.lora import watch_adapters
from qvd_diffusers.quantizer import QVDQuantizer


def register() -> None:
    """Enter the config and the quantizer under "qvd", and let adapters merge. Calling it again changes nothing.

    diffusers has no registration function; its two mappings are plain dicts, and adding an entry replaces nothing.
    """
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QVDMethod.QVD.value] = QVDConfig
    diffusers_auto.AUTO_QUANTIZER_MAPPING[QVDMethod.QVD.value] = QVDQuantizer
    _register_with_transformers()
    watch_adapters()


def _register_with_transformers() -> None:
    """`PipelineQuantizationConfig(quant_backend="qvd")` looks for the config in transformers' mapping, too."""
    try:
        from transformers.quantizers import auto as transformers_auto
        from transformers.quantizers.base import HfQuantizer
    except ImportError:
        return

    class TextEncoderRefusal(HfQuantizer):
        """Answers a request for a quantized text encoder with one clear error.

        Without it transformers either fails with a list of other methods or, for a checkpoint, only warns and
        computes with int8 codes as if they were weights.
        """

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            raise QVDError(text_encoder_refusal())

        @property
        def is_trainable(self) -> bool:
            return False

        def is_serializable(self, *arguments: Any, **keywords: Any) -> bool:
            return False

    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QVDMethod.QVD.value] = QVDConfig
    transformers_auto.AUTO_QUANTIZER_MAPPING[QVDMethod.QVD.value] = TextEncoderRefusal
