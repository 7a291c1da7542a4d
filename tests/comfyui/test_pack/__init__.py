"""Nodes for tests only, copied into the test server: conditionings without a text encoder, lossless outputs, a hash."""

from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]
