"""LTX-Video and LTX-2, which makes sound with the video, in ComfyUI. The sampler hands on sigmas, from 0 to 1."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold, Sinusoid
from qvd_core.families.names import DUAL_BLOCK, QKV, below

_TEXT_KV = ("to_k", "to_v")
_GATE = "to_gate_logits"  # one number per head and token; LTX-2.3 and later


def _table(name: str, row: int, consumers: tuple[str, ...]) -> Fold:
    return Fold("table", DUAL_BLOCK, (name,), consumers, sections=((row, None),))


def _text_tables(stream: str) -> tuple[Fold, ...]:
    """Where the attention to the text is modulated too, by rows of its own for the queries and for the text."""
    return (
        _table(f"{stream}scale_shift_table", 6, below(f"{stream}attn2", ("to_q", _GATE))),
        _table(f"{stream}prompt_scale_shift_table", 0, below(f"{stream}attn2", _TEXT_KV)),
    )


LTX_VIDEO = Family(
    name="LTX-Video",
    classes=("LTXVModel",),
    keep=("patchify_proj", "adaln_single.emb.**", "caption_projection.**", "proj_out"),
    temporal=("adaln_single.linear",),
    temporal_features=(Sinusoid(1000.0), "adaln_single.emb.timestep_embedder", "adaln_single.silu"),
    timestep_range=(0.0, 1.0),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn2", _TEXT_KV)),
    prompt_inputs=below(f"{DUAL_BLOCK}.attn2", _TEXT_KV),
    sample_argument="x",
    frames_dim=2,  # but keyframes come behind the video, and tokens may be left out: no frame order
    folds=(  # attn2.to_q reads the residual stream itself: it has no producer
        _table("scale_shift_table", 0, below("attn1", QKV)),
        _table("scale_shift_table", 3, ("ff.net.0.proj",)),
        Fold("value", DUAL_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
        Fold("value", DUAL_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",)),
    ),
)

_TEXT_IS_MODULATED = "transformer_blocks.0.prompt_scale_shift_table"

LTX_VIDEO_MODULATED_TEXT = replace(
    LTX_VIDEO,
    signature=(_TEXT_IS_MODULATED,),
    # The text has a timestep embedding of its own: the features come from calibration.
    keep=(*LTX_VIDEO.keep, "prompt_adaln_single.emb.**"),
    temporal=(*LTX_VIDEO.temporal, "prompt_adaln_single.linear"),
    temporal_features=(),
    folds=(*LTX_VIDEO.folds, *_text_tables("")),
)

_EMBEDDINGS = (
    "adaln_single",
    "audio_adaln_single",
    "av_ca_video_scale_shift_adaln_single",
    "av_ca_a2v_gate_adaln_single",
    "av_ca_audio_scale_shift_adaln_single",
    "av_ca_v2a_gate_adaln_single",
)
_TEXT_EMBEDDINGS = ("prompt_adaln_single", "audio_prompt_adaln_single")
_VIDEO_TABLE, _AUDIO_TABLE = "scale_shift_table_a2v_ca_video", "scale_shift_table_a2v_ca_audio"


LTX2 = Family(
    name="LTX-2",
    classes=("LTXAVModel",),
    keep=(
        "patchify_proj",
        "audio_patchify_proj",
        "caption_projection.**",
        "audio_caption_projection.**",
        # They prepare the text, once for each prompt.
        "video_embeddings_connector.**",
        "audio_embeddings_connector.**",
        *(f"{name}.emb.**" for name in _EMBEDDINGS),
        "proj_out",
        "audio_proj_out",
    ),
    # Six to eight embeddings of their own: the features of each come from calibration.
    temporal=tuple(f"{name}.linear" for name in _EMBEDDINGS),
    timestep_range=(0.0, 1.0),
    shared_inputs=(
        *((f"{DUAL_BLOCK}.{attention}", (*QKV, _GATE)) for attention in ("attn1", "audio_attn1")),
        *(
            (f"{DUAL_BLOCK}.{attention}", names)
            for attention in ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
            for names in (("to_q", _GATE), _TEXT_KV)
        ),
    ),
    prompt_inputs=tuple(
        f"{DUAL_BLOCK}.{attention}.{layer}" for attention in ("attn2", "audio_attn2") for layer in _TEXT_KV
    ),
    sample_argument="x",  # a list, video and sound; so is the timestep
    folds=(  # behind an attention nothing folds: a gated one multiplies the shift
        _table("scale_shift_table", 0, below("attn1", (*QKV, _GATE))),
        _table("scale_shift_table", 3, ("ff.net.0.proj",)),
        _table("audio_scale_shift_table", 0, below("audio_attn1", (*QKV, _GATE))),
        _table("audio_scale_shift_table", 3, ("audio_ff.net.0.proj",)),
        _table(_VIDEO_TABLE, 1, below("audio_to_video_attn", ("to_q", _GATE))),
        _table(_VIDEO_TABLE, 3, below("video_to_audio_attn", _TEXT_KV)),
        _table(_AUDIO_TABLE, 1, below("audio_to_video_attn", _TEXT_KV)),
        _table(_AUDIO_TABLE, 3, below("video_to_audio_attn", ("to_q", _GATE))),
    ),
)

LTX2_MODULATED_TEXT = replace(
    LTX2,
    signature=(_TEXT_IS_MODULATED,),
    keep=(*LTX2.keep, *(f"{name}.emb.**" for name in _TEXT_EMBEDDINGS)),
    temporal=(*LTX2.temporal, *(f"{name}.linear" for name in _TEXT_EMBEDDINGS)),
    folds=(*LTX2.folds, *_text_tables(""), *_text_tables("audio_")),
)

FAMILIES = (LTX_VIDEO, LTX_VIDEO_MODULATED_TEXT, LTX2, LTX2_MODULATED_TEXT)
