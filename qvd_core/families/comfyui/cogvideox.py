"""CogVideoX 1 and 1.5 in ComfyUI: the class name is that of diffusers, the module names are not."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold, Sinusoid

_BLOCK = "blocks.*"
_QKV = ("q", "k", "v")
_VIDEO_AND_TEXT = ((0, 1), (3, 4))  # one linear modulates both streams, which one layer then reads

COGVIDEOX = Family(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    signature=("time_embedding_linear_1",),
    keep=(
        "patch_embed.*",  # ComfyUI reads the type of their weights
        "time_embedding_linear_1",
        "time_embedding_linear_2",
        "ofs_embedding_linear_1",
        "ofs_embedding_linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    temporal=(f"{_BLOCK}.norm1.linear", f"{_BLOCK}.norm2.linear"),
    temporal_features=(
        Sinusoid(),
        "time_embedding_linear_1",
        "time_embedding_act",
        "time_embedding_linear_2",
        "blocks.0.norm1.silu",
    ),
    other_conditions=("ofs_embedding_linear_1",),
    shared_inputs=((_BLOCK, _QKV),),
    sample_argument="x",
    frames_dim=2,
    folds=(
        Fold("modulation", _BLOCK, ("norm1.linear",), _QKV, sections=_VIDEO_AND_TEXT),
        Fold("modulation", _BLOCK, ("norm2.linear",), ("ff_proj",), sections=_VIDEO_AND_TEXT),
        Fold("value", _BLOCK, ("v",), ("attn_out",)),
    ),
)

FAMILIES = (COGVIDEOX,)
