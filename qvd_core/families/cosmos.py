"""Cosmos 1 to 2.5, its ControlNet, and Cosmos 3, which is a language model with a second tower for what it makes."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import ADDED_QKV, DUAL_BLOCK, QKV, below

_CONTEXT = ("to_k", "to_v", "k_img", "v_img")  # of attn2: text, and a picture in Cosmos 2.5


def _cosmos(name: str, class_name: str, block: str, keep: tuple[str, ...]) -> Family:
    return Family(
        name=name,
        classes=(class_name,),
        keep=("patch_embed.proj", "time_embed.**", "crossattn_proj.**", "img_context_proj.**", *keep),
        # A low-rank modulation per norm. Its second half reads what the first computes: no features they share.
        temporal=tuple(f"{block}.{norm}.{half}" for norm in ("norm1", "norm2", "norm3") for half in _HALVES),
        shared_inputs=(
            (f"{block}.attn1", QKV),
            (f"{block}.attn2", ("to_q", "q_img")),
            (f"{block}.attn2", ("to_k", "to_v")),
            (f"{block}.attn2", ("k_img", "v_img")),
        ),
        prompt_inputs=below(f"{block}.attn2", _CONTEXT),
        frames_dim=2,
        frame_order=(  # latents are patched in space only, so tokens keep the frames apart
            (f"{block}.attn1.**", "major"),
            (f"{block}.attn2.**", "major"),
            (f"{block}.ff.**", "major"),
        ),
        folds=(  # no linear of a block has a bias: nothing takes a shift
            Fold("value", block, ("attn1.to_v",), ("attn1.to_out.0",)),
            Fold("value", block, ("attn2.to_v",), ("attn2.to_out.0",), addends=("attn2.v_img",)),
        ),
    )


_HALVES = ("linear_1", "linear_2")

COSMOS = _cosmos("Cosmos", "CosmosTransformer3DModel", DUAL_BLOCK, ("norm_out.**", "proj_out"))

_CONTROL_BLOCK = "control_blocks.*"

COSMOS_CONTROL = replace(
    _cosmos(
        "Cosmos ControlNet",
        "CosmosControlNetModel",
        _CONTROL_BLOCK,
        # What goes into and comes out of the control branch starts at zero and adds to the denoiser's own stream.
        ("patch_embed_base.proj", *below(_CONTROL_BLOCK, ("before_proj", "after_proj"))),
    ),
    sample_argument="latents",
)

_LAYER = "layers.*"
_READS_TEXT = (*below(f"{_LAYER}.self_attn", (*QKV, "to_out")), f"{_LAYER}.mlp.*")  # the understanding tower

COSMOS3 = Family(
    name="Cosmos 3",
    classes=("Cosmos3OmniTransformer",),
    keep=("time_embedder.**", "proj_in", "audio_proj_in", "lm_head", "proj_out", "audio_proj_out"),
    shared_inputs=(
        (f"{_LAYER}.self_attn", QKV),
        (f"{_LAYER}.self_attn", ADDED_QKV),
        (f"{_LAYER}.mlp", ("gate_proj", "up_proj")),
        (f"{_LAYER}.mlp_moe_gen", ("gate_proj", "up_proj")),
    ),
    prompt_inputs=_READS_TEXT,
    timestep_argument="vision_timesteps",
    sample_argument="vision_tokens",
    folds=(  # RMSNorms: no shift
        Fold("norm", _LAYER, ("input_layernorm",), below("self_attn", QKV)),
        Fold("norm", _LAYER, ("input_layernorm_moe_gen",), below("self_attn", ADDED_QKV)),
        Fold("norm", _LAYER, ("post_attention_layernorm",), below("mlp", ("gate_proj", "up_proj"))),
        Fold("norm", _LAYER, ("post_attention_layernorm_moe_gen",), below("mlp_moe_gen", ("gate_proj", "up_proj"))),
    ),
)

FAMILIES = (COSMOS, COSMOS_CONTROL, COSMOS3)
