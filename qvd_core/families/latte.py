"""Latte and Allegro: PixArt's blocks over video."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import DUAL_BLOCK, QKV, below

_TEMPORAL_BLOCK = "temporal_transformer_blocks.*"
_KEEP = ("pos_embed.**", "adaln_single.emb.**", "caption_projection.**", "proj_out")
_FEATURES = ("adaln_single.emb.time_proj", "adaln_single.emb.timestep_embedder", "adaln_single.silu")


def _folds(block: str, attentions: tuple[str, ...]) -> tuple[Fold, ...]:
    """attn2.to_q reads the residual stream itself: it has no producer."""
    return (
        Fold("table", block, ("scale_shift_table",), below("attn1", QKV), sections=((0, None),)),
        Fold("table", block, ("scale_shift_table",), ("ff.net.0.proj",), sections=((3, None),)),
        *(Fold("value", block, (f"{attention}.to_v",), (f"{attention}.to_out.0",)) for attention in attentions),
    )


LATTE = Family(
    name="Latte",
    classes=("LatteTransformer3DModel",),
    keep=_KEEP,
    temporal=("adaln_single.linear",),
    temporal_features=_FEATURES,
    shared_inputs=(
        (f"{DUAL_BLOCK}.attn1", QKV),
        (f"{DUAL_BLOCK}.attn2", ("to_k", "to_v")),
        (f"{_TEMPORAL_BLOCK}.attn1", QKV),
    ),
    prompt_inputs=below(f"{DUAL_BLOCK}.attn2", ("to_k", "to_v")),
    frames_dim=2,
    frame_order=((f"{_TEMPORAL_BLOCK}.**", "minor"), (f"{DUAL_BLOCK}.**", "major")),
    folds=(*_folds(DUAL_BLOCK, ("attn1", "attn2")), *_folds(_TEMPORAL_BLOCK, ("attn1",))),
)

ALLEGRO = Family(
    name="Allegro",
    classes=("AllegroTransformer3DModel",),
    keep=_KEEP,
    temporal=("adaln_single.linear",),
    temporal_features=_FEATURES,
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn2", ("to_k", "to_v"))),
    prompt_inputs=below(f"{DUAL_BLOCK}.attn2", ("to_k", "to_v")),
    frames_dim=2,
    frame_order=((f"{DUAL_BLOCK}.**", "major"),),
    folds=_folds(DUAL_BLOCK, ("attn1", "attn2")),
)

FAMILIES = (LATTE, ALLEGRO)
