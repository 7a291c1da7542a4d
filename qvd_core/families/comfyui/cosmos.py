"""Cosmos 1, Cosmos Predict 2, and Anima, an image model of the same kind, in ComfyUI."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import below

_BLOCK = "blocks.*.blocks.*"
_SELF, _CROSS = "blocks.*.blocks.0.block.attn", "blocks.*.blocks.1.block.attn"

COSMOS = Family(
    name="Cosmos",
    classes=("GeneralDIT",),
    keep=("x_embedder.**", "t_embedder.**", "final_layer.**"),
    # A low-rank modulation per norm. Its second half reads what the first computes: no features they share.
    temporal=(f"{_BLOCK}.adaLN_modulation.1", f"{_BLOCK}.adaLN_modulation.2"),
    timestep_range=(-1.5537, 1.0956),  # a quarter of log sigma, for sigmas from 0.002 to 80
    shared_inputs=((_SELF, ("to_q.0", "to_k.0", "to_v.0")), (_CROSS, ("to_k.0", "to_v.0"))),
    prompt_inputs=below(_CROSS, ("to_k.0", "to_v.0")),
    timestep_argument="timesteps",
    sample_argument="x",
    frames_dim=2,  # but the batch runs faster than the frames: no frame order
    folds=(Fold("value", f"{_BLOCK}.block.attn", ("to_v.0",), ("to_out.0",)),),  # no bias: nothing takes a shift
)

_PREDICT_BLOCK = "blocks.*"
_QKV, _KV = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")
_NORMS = ("self_attn", "cross_attn", "mlp")

COSMOS_PREDICT2 = Family(
    name="Cosmos Predict 2",
    classes=("MiniTrainDIT",),
    keep=COSMOS.keep,
    temporal=tuple(f"{_PREDICT_BLOCK}.adaln_modulation_{norm}.{half}" for norm in _NORMS for half in (1, 2)),
    timestep_range=(0.0, 1.0),
    shared_inputs=((f"{_PREDICT_BLOCK}.self_attn", _QKV), (f"{_PREDICT_BLOCK}.cross_attn", _KV)),
    prompt_inputs=below(f"{_PREDICT_BLOCK}.cross_attn", _KV),
    timestep_argument="timesteps",
    sample_argument="x",
    frames_dim=2,
    frame_order=(  # latents are patched in space only, so tokens keep the frames apart
        (f"{_PREDICT_BLOCK}.self_attn.**", "major"),
        (f"{_PREDICT_BLOCK}.cross_attn.**", "major"),
        (f"{_PREDICT_BLOCK}.mlp.**", "major"),
    ),
    folds=tuple(
        Fold("value", f"{_PREDICT_BLOCK}.{attention}", ("v_proj",), ("output_proj",))
        for attention in ("self_attn", "cross_attn")
    ),
)

ANIMA = replace(
    COSMOS_PREDICT2,
    name="Anima",
    classes=("Anima",),
    keep=(*COSMOS_PREDICT2.keep, "llm_adapter.**"),  # it prepares the text, once for each prompt
    image=True,
)

FAMILIES = (COSMOS, COSMOS_PREDICT2, ANIMA)
