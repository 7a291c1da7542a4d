"""MiniMax-H3 in ComfyUI: video, audio and text as one packed sequence."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold

_BLOCK, _REFINER = "blocks.*", "token_refiner.blocks.*"

# One linear modulates the rows of all three kinds; every kind has six sections of its own.
_ATTENTION_SECTIONS = tuple((kind * 6, kind * 6 + 1) for kind in range(3))
_FEED_FORWARD_SECTIONS = tuple((kind * 6 + 3, kind * 6 + 4) for kind in range(3))

MINIMAX_H3 = Family(
    name="MiniMax-H3",
    classes=("MiniMaxH3Model",),
    keep=("video_patch_proj", "audio_patch_proj", "condition_proj", "time_embedder.**", "final_layer.**"),
    # Video, sound and text embed timesteps of their own, each 1 minus a sigma: no temporal_features.
    temporal=(f"{_BLOCK}.adaln_proj.linear",),
    prompt_inputs=(f"{_REFINER}.**",),
    sample_argument="x",  # a list: the latents of the video, then those of the sound
    folds=(  # q, k and v are one linear without bias, and the gate of an FFN comes first
        Fold("modulation", _BLOCK, ("adaln_proj.linear",), ("attn.qkv_proj",), sections=_ATTENTION_SECTIONS),
        Fold("modulation", _BLOCK, ("adaln_proj.linear",), ("mlp.fc1",), sections=_FEED_FORWARD_SECTIONS),
        Fold("norm", _REFINER, ("norm1",), ("attn.qkv_proj",)),
        Fold("norm", _REFINER, ("norm2",), ("mlp.fc1",)),
    ),
)

FAMILIES = (MINIMAX_H3,)
