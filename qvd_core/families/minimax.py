"""MiniMax-H3: video, audio and text as one packed sequence."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import DUAL_BLOCK, QKV, below

_REFINER = "token_refiner.refiner_blocks.*"

# One linear modulates the rows of all three kinds; every kind has six sections of its own.
_ATTENTION_SECTIONS = tuple((kind * 6, kind * 6 + 1) for kind in range(3))
_FEED_FORWARD_SECTIONS = tuple((kind * 6 + 3, kind * 6 + 4) for kind in range(3))

MINIMAX_H3 = Family(
    name="MiniMax-H3",
    classes=("MiniMaxH3Transformer3DModel",),
    keep=(
        "proj_in",
        "audio_proj_in",
        "context_embedder",
        "time_embedder.**",
        "norm_out.linear",
        "proj_out",
        "audio_proj_out",
    ),
    # Its timesteps lie in [0, 1], outside of the grid that data-free features are taken on: no temporal_features.
    temporal=(f"{DUAL_BLOCK}.adaln_proj.linear",),
    shared_inputs=((f"{DUAL_BLOCK}.attn", QKV), (f"{_REFINER}.attn", QKV)),
    prompt_inputs=(f"{_REFINER}.**",),
    folds=(  # no linear but the modulation has a bias: nothing else takes a shift
        Fold("modulation", DUAL_BLOCK, ("adaln_proj.linear",), below("attn", QKV), sections=_ATTENTION_SECTIONS),
        Fold("modulation", DUAL_BLOCK, ("adaln_proj.linear",), ("ff.net.0.proj",), sections=_FEED_FORWARD_SECTIONS),
        Fold("norm", _REFINER, ("norm1",), below("attn", QKV)),
        Fold("norm", _REFINER, ("norm2",), ("ff.net.0.proj",)),
        *(Fold("value", block, ("attn.to_v",), ("attn.to_out.0",)) for block in (DUAL_BLOCK, _REFINER)),
        *(Fold("gate", block, ("ff.net.0.proj",), ("ff.net.2",)) for block in (DUAL_BLOCK, _REFINER)),
    ),
)

FAMILIES = (MINIMAX_H3,)
