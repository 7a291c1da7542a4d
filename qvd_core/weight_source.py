"""Where calibration reads a layer's float weights: in the model itself, or wherever else they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from qvd_core.checks import check_finite
from qvd_core.errors import QVDError

WeightSource = Callable[[str], tuple[Tensor, Tensor | None]]
"""Layer name -> its float weight [N, K, ...] and bias [N], on the device where the search shall run."""


def own_weights(layers: Mapping[str, nn.Module]) -> WeightSource:
    """The weights the layers hold. Raises QVDError when they are not in memory (meta tensors)."""

    def read(name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = layers[name].weight, layers[name].bias
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise QVDError(f"the weight of layer {name} is not in memory: bring the model back from offloading first.")
        return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None

    return read


def read_finite(source: WeightSource, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of layer `name`. Raises QVDError when they hold NaN or infinity."""
    weight, bias = source(name)
    check_finite(f"{name}.weight", weight)
    if bias is not None:
        check_finite(f"{name}.bias", bias)
    return weight, bias
