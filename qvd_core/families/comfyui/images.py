"""Models of ComfyUI that make images (or sounds, or shapes), not videos: they go through the generic rule."""

from __future__ import annotations

from qvd_core.families.family import Family

GENERIC_MINIMUM_FEATURES = 64

IMAGE_DENOISERS = frozenset(
    {
        "AceStepConditionGenerationModel",
        "AudioDiffusionTransformer",
        "Chroma",
        "ChromaRadiance",
        "ErnieImageModel",
        "Flux",
        "HiDreamO1Transformer",
        "HunYuanDiT",
        "HunYuanDiTPlain",
        "Hunyuan3Dv2",
        "LatentSeqMMFlowModel",
        "MMDiT",
        "MiniMaxMusic3DiT",
        "NextDiT",
        "NextDiTPixelSpace",
        "OpenAISignatureMMDITWrapper",
        "PidNet",
        "PixArtMS",
        "PixDiT_T2I",
        "SingleStreamDiT",
        "StageB",
        "StageC",
        "Trellis2",
    }
)
"""Class names; those that end with "2DModel" (QwenImageTransformer2DModel and many more) need no entry."""

GENERIC_IMAGE = Family(
    name="generic image",
    classes=(),
    keep=(
        # ComfyUI casts the input of these to the type of their weight.
        "**.cond_embed",
        "**.t_embedder.**",
        # What embeds latents, text and timesteps, and the last projection, by the names that most models use.
        "**.x_embedder.**",
        "**.y_embedder.**",
        "**.cap_embedder.**",
        "**.context_embedder.**",
        "**.timestep_embedder.**",
        *(f"{name}_in.**" for name in ("img", "txt", "time", "vector", "guidance")),
        "norm_out.**",
        "proj_out",
        "final_layer.**",
    ),
    temporal=("**.img_mod.*", "**.txt_mod.*", "**.modulation.lin", "**.adaLN_modulation.*"),
    minimum_features=GENERIC_MINIMUM_FEATURES,
    image=True,
)
