"""Features that skip or alter the work of blocks and attention layers: diffusers' hooks, processors and guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import hooks

from qvd_diffusers.rebuilding import rebuilding
from tests.diffusers.features import Judge, feature
from tests.diffusers.tiny_pipelines import TinyPipeline

ATTENTION = [r".*blocks\.\d+\.attn\d?", r".*temp_attentions\.\d+"]
STEPS = 4
APPROXIMATION = {"judge": Judge.APPROXIMATION, "steps": STEPS}


def timestep_seen_by(model: Any) -> Callable[[], float]:
    """A function that tells the timestep the model was called with last; some pipelines do not."""
    seen = [torch.tensor(0.0)]

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[0] = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return lambda: float(seen[0].max())


def not_at_the_start(pipe: Any) -> tuple[float, float]:
    """Timesteps but for the first one, as a caching hook wants them."""
    pipe.scheduler.set_timesteps(STEPS)
    first, second = pipe.scheduler.timesteps[:2].tolist()
    return (-10.0, (first + second) / 2)


def cached(kind: TinyPipeline, pipe: Any, name: str, **settings: Any) -> None:
    """Turn on one of diffusers' caches by the name of its config class."""
    kind.model(pipe).enable_cache(getattr(hooks, f"{name}Config")(**settings))


def cache(config: str) -> dict[str, Any]:
    """The settings of a feature that is a cache of this config class."""
    return {
        "needs": ("denoiser.enable_cache", f"hooks.{config}"),
        "undo": lambda kind, pipe: kind.model(pipe).disable_cache(),
        **APPROXIMATION,
    }


@feature("FirstBlockCache", **cache("FirstBlockCacheConfig"))
def first_block_cache(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """A threshold that skips the other blocks from the second step on."""
    cached(kind, pipe, "FirstBlockCache", threshold=1e9)


@feature("TaylorSeer", **cache("TaylorSeerCacheConfig"))
def taylor_seer(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    cached(
        kind,
        pipe,
        "TaylorSeerCache",
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=ATTENTION,
    )


@feature("PyramidAttentionBroadcast", **cache("PyramidAttentionBroadcastConfig"))
def pyramid_attention_broadcast(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    always = not_at_the_start(pipe)
    cached(
        kind,
        pipe,
        "PyramidAttentionBroadcast",
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=always,
        cross_attention_timestep_skip_range=always,
        current_timestep_callback=timestep_seen_by(kind.model(pipe)),
    )


@feature("FasterCache", **cache("FasterCacheConfig"))
def faster_cache(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """Attention is extrapolated from the steps before; both guidance branches are computed."""
    cached(
        kind,
        pipe,
        "FasterCache",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=not_at_the_start(pipe),
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=timestep_seen_by(kind.model(pipe)),
    )


@feature("FasterCache of the unconditional branch", **cache("FasterCacheConfig"))
def faster_cache_without_branch(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """The model's forward runs on half the batch that the model was called with."""
    always = not_at_the_start(pipe)
    cached(
        kind,
        pipe,
        "FasterCache",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=always,
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=always,
        low_frequency_weight_update_timestep_range=always,
        high_frequency_weight_update_timestep_range=always,
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BFCHW",
        current_timestep_callback=timestep_seen_by(kind.model(pipe)),
    )


@feature("MagCache", **cache("MagCacheConfig"))
def mag_cache(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    cached(
        kind,
        pipe,
        "MagCache",
        threshold=10.0,
        max_skip_steps=1,
        retention_ratio=0.25,
        num_inference_steps=STEPS,
        mag_ratios=[1.0] * STEPS,
    )


@feature("SeaCache", **cache("SeaCacheConfig"))
def sea_cache(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    cached(kind, pipe, "SeaCache", threshold=1e9)


@feature("apply_layer_skip", needs=("hooks.LayerSkipConfig",), **APPROXIMATION)
def layer_skip(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """The second block is left out, as skip-layer guidance does."""
    hooks.apply_layer_skip(kind.model(pipe), hooks.LayerSkipConfig(indices=[1]))


@feature(
    'set_attention_backend("_native_math")',
    needs=("denoiser.set_attention_backend",),
    undo=lambda kind, pipe: kind.model(pipe).reset_attention_backend(),
)
def attention_backend(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).set_attention_backend("_native_math")


@feature("set_attn_processor", needs=("denoiser.set_attn_processor",))
def attention_processors(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    model = kind.model(pipe)
    model.set_attn_processor({name: type(old)() for name, old in model.attn_processors.items()})


@feature(
    "fuse_qkv_projections",
    needs=("denoiser.fuse_qkv_projections",),
    undo=lambda kind, pipe: kind.model(pipe).unfuse_qkv_projections(),
)
def fused_projections(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).fuse_qkv_projections()


@feature(
    "enable_free_init",
    needs=("pipe.enable_free_init",),
    judge=Judge.APPROXIMATION,
    undo=lambda kind, pipe: pipe.disable_free_init(),
)
def free_init(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_free_init(num_iters=2)


@feature(
    "enable_freeu",
    needs=("pipe.enable_freeu", "denoiser.enable_freeu"),
    judge=Judge.APPROXIMATION,
    undo=lambda kind, pipe: pipe.disable_freeu(),
)
def free_u(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def disable_free_noise(kind: TinyPipeline, pipe: Any) -> None:
    with rebuilding(kind.model(pipe)):
        pipe.disable_free_noise()


@feature("enable_free_noise", needs=("pipe.enable_free_noise",), undo=disable_free_noise)
def free_noise(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """A window of all frames: the new blocks compute what the old ones did."""
    with rebuilding(kind.model(pipe)):
        pipe.enable_free_noise(context_length=2, context_stride=2, noise_type="random")


@feature(
    "enable_free_noise with windows",
    needs=("pipe.enable_free_noise",),
    undo=disable_free_noise,
    judge=Judge.APPROXIMATION,
    call={"num_frames": 4},
)
def free_noise_windows(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    with rebuilding(kind.model(pipe)):
        pipe.enable_free_noise(context_length=2, context_stride=1)
