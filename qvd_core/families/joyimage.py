"""JoyImage-Edit: images as clips of a few items, through dual stream blocks with fused q, k and v."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold

_BLOCK = "double_blocks.*"

JOY_IMAGE_EDIT = Family(
    name="JoyImage-Edit",
    classes=("JoyImageEditTransformer3DModel",),
    keep=("img_in", "condition_embedder.time_embedder.**", "condition_embedder.text_embedder.**", "proj_out"),
    temporal=("condition_embedder.time_proj",),
    temporal_features=(
        "condition_embedder.timesteps_proj",
        "condition_embedder.time_embedder",
        "condition_embedder.act_fn",
    ),
    folds=tuple(  # time_proj is shared by all blocks, and the values are a part of a fused linear
        Fold("table", _BLOCK, (f"{stream}_mod.modulate_table",), (consumer,), sections=((row, None),))
        for stream in ("img", "txt")
        for row, consumer in ((0, f"attn.{stream}_attn_qkv"), (3, f"{stream}_mlp.net.0.proj"))
    ),
)

FAMILIES = (JOY_IMAGE_EDIT,)
