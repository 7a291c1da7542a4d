"""Kandinsky 5 and 6, and the super-resolution of the latter. "out_layer" means a different thing at every level."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import below

_QKV = ("to_query", "to_key", "to_value")
_KV = ("to_key", "to_value")
_TEXT, _VISUAL = "text_transformer_blocks.*", "visual_transformer_blocks.*"


def _modulation(block: str, producer: str, consumers: tuple[str, ...], row: int) -> Fold:
    """Shift, scale and gate are three rows of one modulation."""
    return Fold("modulation", block, (f"{producer}.out_layer",), consumers, sections=((row, row + 1),))


def _value(block: str, attention: str) -> Fold:
    return Fold("value", block, (f"{attention}.to_value",), (f"{attention}.out_layer",))


KANDINSKY5 = Family(
    name="Kandinsky 5",
    classes=("Kandinsky5Transformer3DModel",),
    keep=(
        "time_embeddings.**",
        "text_embeddings.**",
        "pooled_text_embeddings.**",
        "visual_embeddings.**",
        "out_layer.**",
    ),
    temporal=(f"{_TEXT}.text_modulation.out_layer", f"{_VISUAL}.visual_modulation.out_layer"),
    shared_inputs=(
        (f"{_TEXT}.self_attention", _QKV),
        (f"{_VISUAL}.self_attention", _QKV),
        (f"{_VISUAL}.cross_attention", _KV),
    ),
    prompt_inputs=(
        f"{_TEXT}.self_attention.*",
        f"{_TEXT}.feed_forward.*",
        *below(f"{_VISUAL}.cross_attention", _KV),
    ),
    frames_dim=1,
    folds=(
        _modulation(_TEXT, "text_modulation", below("self_attention", _QKV), 0),
        _modulation(_TEXT, "text_modulation", ("feed_forward.in_layer",), 3),
        _value(_TEXT, "self_attention"),
        _modulation(_VISUAL, "visual_modulation", below("self_attention", _QKV), 0),
        _modulation(_VISUAL, "visual_modulation", ("cross_attention.to_query",), 3),
        _modulation(_VISUAL, "visual_modulation", ("feed_forward.in_layer",), 6),
        _value(_VISUAL, "self_attention"),
        _value(_VISUAL, "cross_attention"),
    ),
)

_TEXTS = ("video_text_transformer_blocks.*", "audio_text_transformer_blocks.*")
_STREAMS = ("video_dec_block", "audio_dec_block")
_OTHER_READER = {"video_dec_block": "av_cross_attention", "audio_dec_block": "va_cross_attention"}
"""The cross attention of the other stream, whose keys and values read what this stream's text queries read."""


def _text_readers(stream: str) -> tuple[str, ...]:
    return (f"{stream}.cross_attention.to_query", *below(_OTHER_READER[stream], _KV))


def _stream_folds(stream: str) -> tuple[Fold, ...]:
    modulation = f"{stream}.visual_modulation"
    return (
        _modulation(_VISUAL, modulation, below(f"{stream}.self_attention", _QKV), 0),
        _modulation(_VISUAL, modulation, _text_readers(stream), 3),
        _modulation(_VISUAL, modulation, (f"{stream}.feed_forward.net.0.proj",), 6),
        _value(_VISUAL, f"{stream}.self_attention"),
        _value(_VISUAL, f"{stream}.cross_attention"),
    )


KANDINSKY6 = Family(
    name="Kandinsky 6",
    classes=("Kandinsky6Transformer3DModel",),
    keep=(
        "visual_embeddings.**",
        "audio_embeddings.**",
        *(
            f"{stream}_{part}_embeddings.**"
            for stream in ("video", "audio")
            for part in ("time", "text", "pooled_text")
        ),
        "out_layer.**",
        "audio_out_layer.**",
    ),
    temporal=(
        *(f"{block}.text_modulation.out_layer" for block in _TEXTS),
        *(f"{_VISUAL}.{stream}.visual_modulation.out_layer" for stream in _STREAMS),
        *(f"{_VISUAL}.{cross}_modulation.out_layer" for cross in ("va", "av")),
    ),
    shared_inputs=(
        *((f"{block}.attn", _QKV) for block in _TEXTS),
        *((f"{_VISUAL}.{stream}.self_attention", _QKV) for stream in _STREAMS),
        *((f"{_VISUAL}.{stream}.cross_attention", _KV) for stream in _STREAMS),
        *((_VISUAL, _text_readers(stream)) for stream in _STREAMS),
    ),
    prompt_inputs=(
        *(f"{block}.{part}.**" for block in _TEXTS for part in ("attn", "feed_forward")),
        *(f"{_VISUAL}.{stream}.cross_attention.{layer}" for stream in _STREAMS for layer in _KV),
    ),
    frames_dim=1,
    folds=(
        *(
            fold
            for block in _TEXTS
            for fold in (
                _modulation(block, "text_modulation", below("attn", _QKV), 0),
                _modulation(block, "text_modulation", ("feed_forward.net.0.proj",), 3),
                _value(block, "attn"),
            )
        ),
        *(fold for stream in _STREAMS for fold in _stream_folds(stream)),
        *(
            fold
            for cross in ("va", "av")
            for fold in (
                _modulation(_VISUAL, f"{cross}_modulation", (f"{cross}_cross_attention.to_query",), 0),
                _value(_VISUAL, f"{cross}_cross_attention"),
            )
        ),
    ),
)

KANDINSKY6_SR = Family(
    name="Kandinsky 6 SR",
    classes=("Kandinsky6SRTransformer3DModel",),
    keep=("time_embeddings.**", "visual_embeddings.**", "out_layer.**"),
    temporal=(f"{_VISUAL}.visual_modulation.out_layer",),  # a trained bias is added to its embedding: no chain gives it
    shared_inputs=((f"{_VISUAL}.self_attention", _QKV),),
    frames_dim=1,
    folds=(
        _modulation(_VISUAL, "visual_modulation", below("self_attention", _QKV), 0),
        _modulation(_VISUAL, "visual_modulation", ("feed_forward.net.0.proj",), 3),
        _value(_VISUAL, "self_attention"),
    ),
)

FAMILIES = (KANDINSKY5, KANDINSKY6, KANDINSKY6_SR)
