"""Sana-Video, SANA-WM and the refiner of the latter, which is LTX-2 without its sound."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold
from qvd_core.families.ltx import LTX2, LTX_VIDEO
from qvd_core.families.names import DUAL_BLOCK, QKV, below

SANA_VIDEO = Family(
    name="Sana-Video",
    classes=("SanaVideoTransformer3DModel",),
    keep=(
        "patch_embedding",
        "time_embed.emb.**",
        "time_embed.timestep_embedder.**",  # with guidance_embeds the embedding is laid out differently
        "time_embed.guidance_embedder.**",
        "caption_projection.**",
        "proj_out",
    ),
    temporal=("time_embed.linear",),
    temporal_features=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder", "time_embed.silu"),
    other_conditions=("time_embed.guidance_embedder",),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn2", ("to_k", "to_v"))),
    prompt_inputs=below(f"{DUAL_BLOCK}.attn2", ("to_k", "to_v")),
    frames_dim=2,
    folds=(  # attn1 is a linear attention, whose weights do not sum to 1
        Fold("table", DUAL_BLOCK, ("scale_shift_table",), below("attn1", QKV), sections=((0, None),)),
        Fold("table", DUAL_BLOCK, ("scale_shift_table",), ("ff.conv_inverted",), sections=((3, None),)),
        Fold("value", DUAL_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",)),
    ),
)

_BLOCK = "blocks.*"

SANA_WM = Family(
    name="SANA-WM",
    classes=("SanaWMTransformer3DModel",),
    keep=(
        "x_embedder.**",
        "plucker_embedder.**",
        "raymap_embedder.**",
        "y_embedder.**",
        "t_embedder.**",
        f"{_BLOCK}.plucker_proj",
        # Gates of a recurrence over the frames: one number per head, and every error is carried on.
        f"{_BLOCK}.attn.beta_proj",
        f"{_BLOCK}.attn.gate_proj",
        "final_layer.**",
    ),
    temporal=("t_block.1",),
    temporal_features=("time_proj", "t_embedder", "t_block.0"),
    shared_inputs=((f"{_BLOCK}.attn", ("qkv", "q_proj_cam", "k_proj_cam", "v_proj_cam", "output_gate")),),
    prompt_inputs=(f"{_BLOCK}.cross_attn.kv_linear",),
    frames_dim=2,
    # The gates, which stay as they are, read the attention's input too: its row of the table cannot move.
    folds=(Fold("table", _BLOCK, ("scale_shift_table",), ("mlp.inverted_conv.conv",), sections=((3, None),)),),
)

_SILENT_EMBEDDINGS = (
    "audio_time_embed",
    *(
        f"av_cross_attn_{part}"
        for part in ("video_scale_shift", "audio_scale_shift", "video_a2v_gate", "audio_v2a_gate")
    ),
)
_SILENT = ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn", "audio_ff")

SANA_WM_REFINER = replace(
    LTX2,
    name="SANA-WM refiner",
    classes=("SanaWMLTX2RefinerTransformer3DModel",),
    keep=(
        *LTX_VIDEO.keep,
        "audio_proj_in",
        "audio_caption_projection.**",
        *(f"{name}.**" for name in _SILENT_EMBEDDINGS),
        "audio_proj_out",
    ),
    temporal=LTX_VIDEO.temporal,
    temporal_features=LTX_VIDEO.temporal_features,
    # It carries the layers of the sound and never runs them: what no calibration can see is dynamic.
    prompt_inputs=(*LTX_VIDEO.prompt_inputs, *(f"{DUAL_BLOCK}.{part}.**" for part in _SILENT)),
)

FAMILIES = (SANA_VIDEO, SANA_WM, SANA_WM_REFINER)
