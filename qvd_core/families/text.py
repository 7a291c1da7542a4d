"""Which layers of a text or image encoder go to int8: the linears of its repeated blocks, whatever its class. [O]

Embeddings, the head of a language model, projections into a shared space and everything else outside the blocks stay
in full precision: they are small, or what they make an error in is read by every block.
"""

from __future__ import annotations

from qvd_core.families.patterns import matches

TEXT_BLOCKS = ("**.block.*.**", "**.blocks.*.**", "**.layer.*.**", "**.layers.*.**", "**.h.*.**")
"""T5 and UMT5; the vision towers of Qwen-VL; BERT; CLIP, SigLIP, Llama, Qwen, Gemma and Mistral; GPT-2."""

TEXT_KEEP = ("**.gate", "**.router", "**.router.**")
"""Routers of experts: a small error there picks another expert."""


def is_text_layer(name: str) -> bool:
    """Whether the linear of this dotted name belongs to one of an encoder's blocks."""
    return matches(name, TEXT_BLOCKS) and not matches(name, TEXT_KEEP)
