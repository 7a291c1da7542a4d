"""The family registry: which layers of which video model are quantized how, as data."""

from qvd_core.families.family import Family, Fold, FrameOrder
from qvd_core.families.registry import FAMILIES, family_or_generic, find_family

__all__ = ["FAMILIES", "Family", "Fold", "FrameOrder", "family_or_generic", "find_family"]
