"""LTX-Video and LTX-2, which makes sound with the video."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import DUAL_BLOCK, QKV, below

LTX_VIDEO = Family(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    keep=("proj_in", "time_embed.emb.**", "caption_projection.**", "proj_out"),
    temporal=("time_embed.linear",),
    temporal_features=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder", "time_embed.silu"),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn2", ("to_k", "to_v"))),
    prompt_inputs=below(f"{DUAL_BLOCK}.attn2", ("to_k", "to_v")),
    folds=(  # attn2.to_q reads the residual stream itself: it has no producer
        Fold("table", DUAL_BLOCK, ("scale_shift_table",), below("attn1", QKV), sections=((0, None),)),
        Fold("table", DUAL_BLOCK, ("scale_shift_table",), ("ff.net.0.proj",), sections=((3, None),)),
        Fold("value", DUAL_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
        Fold("value", DUAL_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",)),
    ),
)

_GATE = "to_gate_logits"  # one number per head and token; LTX-2.3 and later
_AUDIO_EMBEDDINGS = ("audio_time_embed", "av_cross_attn_audio_scale_shift", "av_cross_attn_audio_v2a_gate")
_VIDEO_EMBEDDINGS = ("time_embed", "av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate")
_PROMPT_EMBEDDINGS = ("prompt_adaln", "audio_prompt_adaln")
_VIDEO_TABLE, _AUDIO_TABLE = "video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table"


def _table(name: str, row: int, consumers: tuple[str, ...]) -> Fold:
    return Fold("table", DUAL_BLOCK, (name,), consumers, sections=((row, None),))


LTX2 = Family(
    name="LTX-2",
    classes=("LTX2VideoTransformer3DModel",),
    keep=(
        "proj_in",
        "audio_proj_in",
        "caption_projection.**",
        "audio_caption_projection.**",
        *(f"{name}.emb.**" for name in (*_VIDEO_EMBEDDINGS, *_AUDIO_EMBEDDINGS, *_PROMPT_EMBEDDINGS)),
        "proj_out",
        "audio_proj_out",
    ),
    # Six to eight embeddings of their own: the features of each come from calibration.
    temporal=tuple(f"{name}.linear" for name in (*_VIDEO_EMBEDDINGS, *_AUDIO_EMBEDDINGS, *_PROMPT_EMBEDDINGS)),
    shared_inputs=(
        *((f"{DUAL_BLOCK}.{attention}", (*QKV, _GATE)) for attention in ("attn1", "audio_attn1")),
        *(
            (f"{DUAL_BLOCK}.{attention}", names)
            for attention in ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
            for names in (("to_q", _GATE), ("to_k", "to_v"))
        ),
    ),
    prompt_inputs=tuple(
        f"{DUAL_BLOCK}.{attention}.{layer}" for attention in ("attn2", "audio_attn2") for layer in ("to_k", "to_v")
    ),
    folds=(  # behind an attention nothing folds: a gated one multiplies the shift
        _table("scale_shift_table", 0, below("attn1", (*QKV, _GATE))),
        _table("scale_shift_table", 3, ("ff.net.0.proj",)),
        _table("audio_scale_shift_table", 0, below("audio_attn1", (*QKV, _GATE))),
        _table("audio_scale_shift_table", 3, ("audio_ff.net.0.proj",)),
        _table(_VIDEO_TABLE, 1, below("audio_to_video_attn", ("to_q", _GATE))),
        _table(_VIDEO_TABLE, 3, below("video_to_audio_attn", ("to_k", "to_v"))),
        _table(_AUDIO_TABLE, 1, below("audio_to_video_attn", ("to_k", "to_v"))),
        _table(_AUDIO_TABLE, 3, below("video_to_audio_attn", ("to_q", _GATE))),
    ),
)

FAMILIES = (LTX_VIDEO, LTX2)
