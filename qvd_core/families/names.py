"""Names that many diffusers models have in common."""

from __future__ import annotations

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
DUAL_BLOCK, SINGLE_BLOCK = "transformer_blocks.*", "single_transformer_blocks.*"


def below(parent: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The dotted names of `names` below one parent."""
    return tuple(f"{parent}.{name}" for name in names)
