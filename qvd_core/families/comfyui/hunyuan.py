"""HunyuanVideo 1 and 1.5 in ComfyUI: one class for both, and for their super-resolution and image models."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold, Sinusoid

_DOUBLE, _SINGLE = "double_blocks.*", "single_blocks.*"


def _stream_folds(stream: str) -> tuple[Fold, ...]:
    """q, k and v are one linear, so that nothing folds behind the attention."""
    return (
        Fold("modulation", _DOUBLE, (f"{stream}_mod.lin",), (f"{stream}_attn.qkv",), sections=((0, 1),)),
        Fold("modulation", _DOUBLE, (f"{stream}_mod.lin",), (f"{stream}_mlp.0",), sections=((3, 4),)),
    )


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    classes=("HunyuanVideo",),
    keep=(
        "img_in.proj",
        "txt_in.**",
        "time_in.**",
        "vector_in.**",
        "guidance_in.**",
        "time_r_in.**",
        "byt5_in.**",
        "vision_in.**",
        "final_layer.**",
    ),
    temporal=(f"{_DOUBLE}.img_mod.lin", f"{_DOUBLE}.txt_mod.lin", f"{_SINGLE}.modulation.lin"),
    temporal_features=(Sinusoid(), "time_in", "time_in.silu"),
    # Pooled text and guidance in version 1; where a step ends in the distilled super-resolution of 1.5.
    other_conditions=("vector_in", "guidance_in.in_layer", "time_r_in"),
    sample_argument="x",
    frames_dim=2,
    folds=(
        *_stream_folds("img"),
        *_stream_folds("txt"),
        Fold("modulation", _SINGLE, ("modulation.lin",), ("linear1",), sections=((0, 1),)),
    ),
)

FAMILIES = (HUNYUAN_VIDEO,)
