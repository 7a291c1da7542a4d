"""Why layers stay in full precision, in words a reader of the report understands."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from qvd_core.families import Family
from qvd_core.families.patterns import has_parts
from qvd_core.layer_kinds import layer_kind
from qvd_core.sensitivity import END_EFFECT
from qvd_core.spec import QuantSpec

FAMILY = "embedder, final projection or other layer that this family keeps"
NAMED = "named in modules_to_not_convert"
SENSITIVE = "sensitive: auto_keep"
OTHER = "not quantized: a grouped or padded convolution, too few channels, or the first or last layer"


def kept_layers(
    model: nn.Module,
    family: Family,
    spec: QuantSpec,
    plan: Collection[str],
    figures: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, str]:
    """Layer -> reason, for every linear and convolution of `model` that is not planned; figures: of `Scales.report`."""
    names = [name for name, module in model.named_modules() if layer_kind(module) is not None and name not in plan]
    return {name: reason(name, family, spec, figures) for name in names}


def reason(
    name: str, family: Family | None, spec: QuantSpec, figures: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Why a layer that is not quantized is not, as far as its name and its figures tell."""
    if family is not None and family.keeps(name):
        return FAMILY
    if has_parts(name, spec.modules_to_not_convert):
        return NAMED
    effect = (figures or {}).get(name, {}).get(END_EFFECT)
    if spec.auto_keep is not None and effect is not None:
        return f"{SENSITIVE} (quantized alone, it leaves the output {effect:.1f} dB)"
    return OTHER
