"""Wan in ComfyUI: `WanModel` and its relatives, which keep the names of the original code."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold, FrameOrder, Sinusoid
from qvd_core.families.names import below

_BLOCK = "blocks.*"
_VACE_BLOCK = "vace_blocks.*"
_QKV = ("q", "k", "v")
_TEXT_KV, _IMAGE_KV = ("k", "v"), ("k_img", "v_img")


def _shared_inputs(block: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((f"{block}.self_attn", _QKV), (f"{block}.cross_attn", _TEXT_KV))


def _frame_order(block: str) -> tuple[tuple[str, FrameOrder], ...]:
    """Latents are patched in space only, so tokens keep the frames apart."""
    return (
        (f"{block}.self_attn.**", "major"),
        (f"{block}.cross_attn.q", "major"),
        (f"{block}.cross_attn.o", "major"),
        (f"{block}.ffn.**", "major"),
    )


def _folds(block: str, addends: tuple[str, ...] = ()) -> tuple[Fold, ...]:
    """The rest of the modulation, time_projection, is shared by all blocks: only a shift fits into a block's row."""
    return (
        Fold("table", block, ("modulation",), below("self_attn", _QKV), sections=((0, None),)),
        Fold("table", block, ("modulation",), ("ffn.0",), sections=((3, None),)),
        Fold("norm", block, ("norm3",), ("cross_attn.q",)),
        Fold("value", block, ("self_attn.v",), ("self_attn.o",)),
        Fold("value", block, ("cross_attn.v",), ("cross_attn.o",), addends=addends),
    )


_TEXT_ONLY = Family(
    name="Wan",
    classes=(),
    keep=("patch_embedding", "text_embedding.**", "time_embedding.**", "head.head"),
    temporal=("time_projection.1",),
    temporal_features=(Sinusoid(), "time_embedding", "time_projection.0"),
    shared_inputs=_shared_inputs(_BLOCK),
    prompt_inputs=below(f"{_BLOCK}.cross_attn", _TEXT_KV),
    sample_argument="x",
    frames_dim=2,
    frame_order=_frame_order(_BLOCK),
    folds=_folds(_BLOCK),
)

# Image to video: `o` reads the sum of two attentions, over the text and over the image.
WAN = replace(
    _TEXT_ONLY,
    classes=("WanModel", "CausalWanModel"),
    keep=(*_TEXT_ONLY.keep, "img_emb.**"),
    shared_inputs=(*_TEXT_ONLY.shared_inputs, (f"{_BLOCK}.cross_attn", _IMAGE_KV)),
    prompt_inputs=below(f"{_BLOCK}.cross_attn", (*_TEXT_KV, *_IMAGE_KV)),
    folds=_folds(_BLOCK, addends=("cross_attn.v_img",)),
)

# The picture to follow is one more frame before the video's.
WAN_REFERENCE = replace(
    WAN, classes=("WanModel",), keep=(*WAN.keep, "ref_conv"), signature=("ref_conv",), frame_order=()
)

WAN_CAMERA = replace(WAN, name="Wan Camera", classes=("CameraWanModel",), keep=(*WAN.keep, "control_adapter.**"))

# The hints: what a control block reads of the video is the main branch's own first hidden state.
WAN_VACE = replace(
    _TEXT_ONLY,
    name="Wan VACE",
    classes=("VaceWanModel",),
    keep=(*_TEXT_ONLY.keep, "vace_patch_embedding", *below(_VACE_BLOCK, ("before_proj", "after_proj"))),
    shared_inputs=(*_TEXT_ONLY.shared_inputs, *_shared_inputs(_VACE_BLOCK)),
    prompt_inputs=(*_TEXT_ONLY.prompt_inputs, *below(f"{_VACE_BLOCK}.cross_attn", _TEXT_KV)),
    frame_order=(*_TEXT_ONLY.frame_order, *_frame_order(_VACE_BLOCK)),
    folds=(*_TEXT_ONLY.folds, *_folds(_VACE_BLOCK)),
)

_INJECTOR = "audio_injector.injector.*"

# A reference image, at timestep 0, and past frames may follow the video's tokens: no frame order.
WAN_S2V = replace(
    _TEXT_ONLY,
    name="Wan S2V",
    classes=("WanModel_S2V",),
    keep=(*_TEXT_ONLY.keep, "casual_audio_encoder.**", "cond_encoder", "frame_packer.*"),
    shared_inputs=(*_TEXT_ONLY.shared_inputs, (_INJECTOR, _TEXT_KV)),
    # The sound is a condition too: it also modulates the norm in front of its attention.
    prompt_inputs=(
        *_TEXT_ONLY.prompt_inputs,
        *below(_INJECTOR, _TEXT_KV),
        "audio_injector.injector_adain_layers.*.linear",
    ),
    frame_order=(),
    folds=(*_TEXT_ONLY.folds, Fold("value", _INJECTOR, ("v",), ("o",))),
)

_AUDIO = f"{_BLOCK}.audio_cross_attn_wrapper"

# Reference frames follow the video's: no frame order.
WAN_HUMO = replace(
    _TEXT_ONLY,
    name="Wan HuMo",
    classes=("HumoWanModel",),
    keep=(*_TEXT_ONLY.keep, "audio_proj.**"),
    shared_inputs=(*_TEXT_ONLY.shared_inputs, (f"{_AUDIO}.audio_cross_attn", _TEXT_KV)),
    prompt_inputs=(*_TEXT_ONLY.prompt_inputs, *below(f"{_AUDIO}.audio_cross_attn", _TEXT_KV)),
    frame_order=(),
    folds=(
        *_TEXT_ONLY.folds,
        Fold("norm", _AUDIO, ("norm1_audio",), ("audio_cross_attn.q",)),
        Fold("value", _AUDIO, ("audio_cross_attn.v",), ("audio_cross_attn.o",)),
    ),
)

_FACE = "face_adapter.fuser_blocks.*"

WAN_ANIMATE = replace(
    WAN,
    name="Wan Animate",
    classes=("AnimateWanModel",),
    keep=(*WAN.keep, "pose_patch_embedding", "face_encoder.**"),
    prompt_inputs=(*WAN.prompt_inputs, f"{_FACE}.linear1_kv"),  # the face is a condition too
    frame_order=(*WAN.frame_order, (f"{_FACE}.linear1_q", "major"), (f"{_FACE}.linear2", "major")),
)

# A pose branch goes through the same blocks, at timestep 1 and with one frame less: no frame order. Its values, and
# those of the reference image, are multiplied by the user's strengths: no fold behind the self-attention.
WAN_ANIMATE_2 = replace(
    WAN,
    name="Wan Animate 2",
    classes=("WanAnimate2Model",),
    frame_order=(),
    folds=tuple(fold for fold in WAN.folds if fold.producers != ("self_attn.v",)),
)

# Reference frames and a pose in the same sequence: no frame order.
WAN_SCAIL = replace(
    WAN,
    name="Wan SCAIL",
    classes=("SCAILWanModel", "SCAIL2WanModel"),
    keep=(*WAN.keep, "patch_embedding_pose", "patch_embedding_mask"),
    frame_order=(),
)

_MUSIC = "music_injector.injector.*"

WAN_DANCER = replace(
    WAN,
    name="Wan Dancer",
    classes=("WanDancerModel",),
    keep=(
        *WAN.keep,
        "patch_embedding_global",
        "img_emb_refimage.**",
        "head_global.head",
        "music_projection",
        "music_encoder.**",
    ),
    shared_inputs=(*WAN.shared_inputs, (_MUSIC, _TEXT_KV)),
    # The music is one token for each part of a frame: all attend to it alone.
    prompt_inputs=(*WAN.prompt_inputs, *below(_MUSIC, (*_TEXT_KV, "o"))),
    frame_order=(*WAN.frame_order, (f"{_MUSIC}.q", "major")),
    folds=(*WAN.folds, Fold("value", _MUSIC, ("v",), ("o",))),
)

FAMILIES = (
    WAN,
    WAN_REFERENCE,
    WAN_CAMERA,
    WAN_VACE,
    WAN_S2V,
    WAN_HUMO,
    WAN_ANIMATE,
    WAN_ANIMATE_2,
    WAN_SCAIL,
    WAN_DANCER,
)
