"""SeedVR2, which restores videos, in ComfyUI: video and text have layers of their own, or share all of them."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold

_BLOCK = "blocks.*"
_STREAMS = ("vid", "txt", "all")
_FEED_FORWARD = ("proj_in", "proj_in_gate")

SEEDVR2 = Family(
    name="SeedVR2",
    classes=("NaDiT",),
    keep=("vid_in.proj", "txt_in", "emb_in.*", "vid_out.proj"),
    # The embedding of the timestep modulates as it is, with static tables: no layer projects it.
    shared_inputs=tuple((f"{_BLOCK}.mlp.{stream}", _FEED_FORWARD) for stream in _STREAMS),
    sample_argument="x",
    frames_dim=2,  # but windows of tokens are what its attention works on: no frame order
    folds=(
        # The last block of some models does not modulate the text, which "all" reads too: nothing folds into it.
        Fold("table", _BLOCK, ("ada.vid.attn_shift",), ("attn.proj_qkv.vid",), sections=((0, None),)),
        *(
            Fold(
                "table",
                _BLOCK,
                (f"ada.{stream}.mlp_shift",),
                tuple(f"mlp.{stream}.{layer}" for layer in _FEED_FORWARD),
                sections=((0, None),),
            )
            for stream in _STREAMS
        ),
    ),
)

FAMILIES = (SEEDVR2,)
