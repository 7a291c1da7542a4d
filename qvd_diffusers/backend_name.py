"""`PipelineQuantizationConfig(quant_backend="qvd", quant_kwargs=...)`: the config diffusers makes from a name.

Without `components_to_quantize`, diffusers makes one for every component of the pipeline, the VAE too, and does not say
for which. A class of its own tells these from a config that a user wrote for one model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from qvd_diffusers.config import QVDConfig

_NAMES_OF_DENOISERS = ("Transformer", "UNet")


class _StandsForEveryConfig(type):
    """diffusers accepts a config that is an instance of a registered class; what users write is a plain `QVDConfig`."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, QVDConfig)


class BackendConfig(QVDConfig, metaclass=_StandsForEveryConfig):
    """A `QVDConfig` that diffusers made from the name "qvd"; what is no denoiser stays as it is."""

    def copy(self) -> QVDConfig:
        """A plain `QVDConfig` of the same settings."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return QVDConfig(**settings)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What is read from a config.json is a plain `QVDConfig`."""
        return QVDConfig.from_dict(config_dict, return_unused_kwargs, **kwargs)


def is_denoiser(model: nn.Module) -> bool:
    """Whether a component that no one named is to be quantized: not a VAE, an adapter, a ControlNet, a vocoder, ..."""
    return any(part in type(model).__name__ for part in _NAMES_OF_DENOISERS)


def made_from_name(config: QVDConfig) -> bool:
    """Whether diffusers made this config from the backend's name."""
    return type(config) is BackendConfig
