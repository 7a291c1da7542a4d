"""Sana-Video and SANA-WM."""

from __future__ import annotations

from collections.abc import Callable

from tests.tiny_models.base import TinyFamily

BUILDERS: dict[str, Callable[[], TinyFamily]] = {}
