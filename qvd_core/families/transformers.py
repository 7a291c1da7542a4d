"""Video transformers: Wan, HunyuanVideo, LTX-Video, CogVideoX and Mochi."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _below(parent: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


_WAN_BLOCK = "blocks.*"

WAN = Family(
    name="Wan",
    classes=("WanTransformer3DModel",),
    keep=(
        "patch_embedding",
        "condition_embedder.time_embedder.**",
        "condition_embedder.text_embedder.**",
        "condition_embedder.image_embedder.**",
        "proj_out",
    ),
    temporal=("condition_embedder.time_proj",),
    temporal_features=(
        "condition_embedder.timesteps_proj",
        "condition_embedder.time_embedder",
        "condition_embedder.act_fn",
    ),
    shared_inputs=(
        (f"{_WAN_BLOCK}.attn1", _QKV),
        (f"{_WAN_BLOCK}.attn2", ("to_k", "to_v")),
        (f"{_WAN_BLOCK}.attn2", ("add_k_proj", "add_v_proj")),
    ),
    prompt_inputs=_below(f"{_WAN_BLOCK}.attn2", ("to_k", "to_v", "add_k_proj", "add_v_proj")),
    frames_dim=2,
    frame_order=(  # latents are patched in space only, so tokens keep the frames apart
        (f"{_WAN_BLOCK}.attn1.**", "major"),
        (f"{_WAN_BLOCK}.attn2.to_q", "major"),
        (f"{_WAN_BLOCK}.attn2.to_out.0", "major"),
        (f"{_WAN_BLOCK}.ffn.**", "major"),
    ),
    folds=(
        # The rest of the modulation, time_proj, is shared by all blocks: only a shift can move into a block's row.
        Fold("table", _WAN_BLOCK, ("scale_shift_table",), _below("attn1", _QKV), sections=((0, None),)),
        Fold("table", _WAN_BLOCK, ("scale_shift_table",), ("ffn.net.0.proj",), sections=((3, None),)),
        Fold("norm", _WAN_BLOCK, ("norm2",), ("attn2.to_q",)),
        Fold("value", _WAN_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
        # Image-to-video: to_out reads the sum of two attentions, over the text and over the image.
        Fold("value", _WAN_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",), addends=("attn2.add_v_proj",)),
    ),
)

_DUAL_BLOCK, _SINGLE_BLOCK = "transformer_blocks.*", "single_transformer_blocks.*"
_SINGLE_READERS = (*_below("attn", _QKV), "proj_mlp")

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    keep=("x_embedder.proj", "context_embedder.**", "time_text_embed.**", "norm_out.linear", "proj_out"),
    temporal=(
        f"{_DUAL_BLOCK}.norm1.linear",
        f"{_DUAL_BLOCK}.norm1_context.linear",
        f"{_SINGLE_BLOCK}.norm.linear",
    ),
    shared_inputs=(
        (f"{_DUAL_BLOCK}.attn", _QKV),
        (f"{_DUAL_BLOCK}.attn", _ADDED_QKV),
        (_SINGLE_BLOCK, _SINGLE_READERS),
    ),
    frames_dim=2,
    folds=(
        Fold("modulation", _DUAL_BLOCK, ("norm1.linear",), _below("attn", _QKV), sections=((0, 1),)),
        Fold("modulation", _DUAL_BLOCK, ("norm1.linear",), ("ff.net.0.proj",), sections=((3, 4),)),
        Fold("modulation", _DUAL_BLOCK, ("norm1_context.linear",), _below("attn", _ADDED_QKV), sections=((0, 1),)),
        Fold("modulation", _DUAL_BLOCK, ("norm1_context.linear",), ("ff_context.net.0.proj",), sections=((3, 4),)),
        Fold("value", _DUAL_BLOCK, ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
        Fold("modulation", _SINGLE_BLOCK, ("norm.linear",), _SINGLE_READERS, sections=((0, 1),)),
        Fold("value", _SINGLE_BLOCK, ("attn.to_v",), ("proj_out",), leading=True),
    ),
)

LTX_VIDEO = Family(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    keep=("proj_in", "time_embed.emb.**", "caption_projection.**", "proj_out"),
    temporal=("time_embed.linear",),
    temporal_features=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder", "time_embed.silu"),
    shared_inputs=((f"{_DUAL_BLOCK}.attn1", _QKV), (f"{_DUAL_BLOCK}.attn2", ("to_k", "to_v"))),
    prompt_inputs=_below(f"{_DUAL_BLOCK}.attn2", ("to_k", "to_v")),
    folds=(  # attn2.to_q reads the residual stream itself: it has no producer
        Fold("table", _DUAL_BLOCK, ("scale_shift_table",), _below("attn1", _QKV), sections=((0, None),)),
        Fold("table", _DUAL_BLOCK, ("scale_shift_table",), ("ff.net.0.proj",), sections=((3, None),)),
        Fold("value", _DUAL_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
        Fold("value", _DUAL_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",)),
    ),
)

_VIDEO_AND_TEXT = ((0, 1), (3, 4))  # one linear modulates both streams, which one layer then reads

COGVIDEOX = Family(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    keep=("patch_embed.**", "time_embedding.**", "ofs_embedding.**", "norm_out.linear", "proj_out"),
    temporal=(f"{_DUAL_BLOCK}.norm1.linear", f"{_DUAL_BLOCK}.norm2.linear"),
    temporal_features=("time_proj", "time_embedding", "transformer_blocks.0.norm1.silu"),
    other_conditions=("ofs_embedding",),
    shared_inputs=((f"{_DUAL_BLOCK}.attn1", _QKV),),
    frames_dim=1,
    folds=(
        Fold("modulation", _DUAL_BLOCK, ("norm1.linear",), _below("attn1", _QKV), sections=_VIDEO_AND_TEXT),
        Fold("modulation", _DUAL_BLOCK, ("norm2.linear",), ("ff.net.0.proj",), sections=_VIDEO_AND_TEXT),
        Fold("value", _DUAL_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
    ),
)

MOCHI = Family(
    name="Mochi",
    classes=("MochiTransformer3DModel",),
    keep=("patch_embed.**", "time_embed.**", "norm_out.linear", "proj_out"),
    temporal=(
        f"{_DUAL_BLOCK}.norm1.linear",
        f"{_DUAL_BLOCK}.norm1_context.linear",
        f"{_DUAL_BLOCK}.norm1_context.linear_1",
    ),
    shared_inputs=((f"{_DUAL_BLOCK}.attn1", _QKV), (f"{_DUAL_BLOCK}.attn1", _ADDED_QKV)),
    frames_dim=2,
    folds=(  # the norms are modulated by a scale alone, and no linear but to_out has a bias: nothing takes a shift
        Fold("modulation", _DUAL_BLOCK, ("norm1.linear",), _below("attn1", _QKV), sections=((None, 0),)),
        Fold("modulation", _DUAL_BLOCK, ("norm1.linear",), ("ff.net.0.proj",), sections=((None, 2),)),
        Fold("modulation", _DUAL_BLOCK, ("norm1_context.linear",), _below("attn1", _ADDED_QKV), sections=((None, 0),)),
        Fold("modulation", _DUAL_BLOCK, ("norm1_context.linear",), ("ff_context.net.0.proj",), sections=((None, 2),)),
        Fold(
            "modulation", _DUAL_BLOCK, ("norm1_context.linear_1",), _below("attn1", _ADDED_QKV), sections=((None, 0),)
        ),
        Fold("value", _DUAL_BLOCK, ("attn1.to_v", "attn1.add_v_proj"), ("attn1.to_out.0", "attn1.to_add_out")),
        Fold("gate", _DUAL_BLOCK, ("ff.net.0.proj",), ("ff.net.2",)),
        Fold("gate", _DUAL_BLOCK, ("ff_context.net.0.proj",), ("ff_context.net.2",)),
    ),
)
