"""Kandinsky 5 and 6."""

from __future__ import annotations

from qvd_core.families.family import Family

FAMILIES: tuple[Family, ...] = ()
