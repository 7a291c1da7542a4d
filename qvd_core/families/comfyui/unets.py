"""The UNet of ComfyUI: Stable Video Diffusion and SV3D, and the Stable Diffusion models that motion modules go into."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold, Sinusoid
from qvd_core.families.names import QKV

_TRANSFORMER_BLOCK, _TIME_BLOCK = "**.transformer_blocks.*", "**.time_stack.*"
_CONTEXT_KV = ("to_k", "to_v")


def _shared_inputs(block: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((f"{block}.attn1", QKV), (f"{block}.attn2", _CONTEXT_KV))


def _block_folds(block: str) -> tuple[Fold, ...]:
    """Nothing folds behind attn2: nodes such as IP-Adapter add a second attention to its output."""
    return (
        Fold("norm", block, ("norm1",), tuple(f"attn1.{layer}" for layer in QKV)),
        Fold("norm", block, ("norm2",), ("attn2.to_q",)),
        Fold("norm", block, ("norm3",), ("ff.net.0.proj",)),
        Fold("gate", block, ("ff.net.0.proj",), ("ff.net.2",)),
        Fold("value", block, ("attn1.to_v",), ("attn1.to_out.0",)),  # to_v has no bias that could take a shift
    )


UNET = Family(
    name="Stable Diffusion UNet",
    classes=("UNetModel",),
    keep=("input_blocks.0.0", "time_embed.**", "label_emb.**", "out.2"),
    temporal=("**.emb_layers.1",),
    temporal_features=(Sinusoid(), "time_embed", "time_embed.1"),
    other_conditions=("label_emb",),
    shared_inputs=_shared_inputs(_TRANSFORMER_BLOCK),
    prompt_inputs=tuple(f"{_TRANSFORMER_BLOCK}.attn2.{layer}" for layer in _CONTEXT_KV),
    timestep_argument="timesteps",
    sample_argument="x",
    folds=(
        # The only parents that have both are spatial transformers.
        Fold("norm", "**", ("norm",), ("proj_in",)),
        *_block_folds(_TRANSFORMER_BLOCK),
    ),
    image=True,
)

# Latents come with the frames in the batch: nothing says where a clip begins, so that no frame order can be used.
SVD = replace(
    UNET,
    name="Stable Video Diffusion",
    signature=("input_blocks.1.0.time_stack",),
    keep=(*UNET.keep, "**.time_pos_embed.*"),
    temporal_features=(),  # fps, motion and the noise of the image are in the embedding too
    other_conditions=(),
    shared_inputs=(*UNET.shared_inputs, *_shared_inputs(_TIME_BLOCK)),
    prompt_inputs=tuple(
        f"{block}.attn2.{layer}"
        for block in (_TRANSFORMER_BLOCK, _TIME_BLOCK)
        for layer in (*_CONTEXT_KV, "to_out.0")  # the image is one token: all attend to it alone
    ),
    folds=(
        *UNET.folds,
        Fold("norm", _TIME_BLOCK, ("norm_in",), ("ff_in.net.0.proj",)),
        Fold("gate", _TIME_BLOCK, ("ff_in.net.0.proj",), ("ff_in.net.2",)),
        *_block_folds(_TIME_BLOCK),
    ),
    image=False,
)

FAMILIES = (UNET, SVD)
