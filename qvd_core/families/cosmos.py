"""Cosmos 1 to 3."""

from __future__ import annotations

from qvd_core.families.family import Family

FAMILIES: tuple[Family, ...] = ()
