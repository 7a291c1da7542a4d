"""Sana-Video and SANA-WM."""

from __future__ import annotations

from qvd_core.families.family import Family

FAMILIES: tuple[Family, ...] = ()
