"""Kandinsky 5 and 6."""

from __future__ import annotations

from collections.abc import Callable

from tests.tiny_models.base import TinyFamily

BUILDERS: dict[str, Callable[[], TinyFamily]] = {}
