"""A stress test: the miniatures with the activation ranges of large models, and the same output.

    python -m examples.moving_digits.stress save wan       # out/stressed/wan
    python -m examples.moving_digits.stress measure both --strength 0.5

[O] `stress` rewrites the weights of a trained denoiser so that the inputs of its matrix multiplications get channels of
very different range, a few of them huge, most of them far from zero, while the function of the model stays what it was:
whatever a layer is made to put out in another unit or around another centre, the layers that read it take back.

It is a stress test, not a large model. The ranges are drawn from a seed, not learned: what makes channels of large
models hard to quantize may come with weights, tokens and timesteps that this does not imitate, and the extremes here
are on the hard side of what is reported. It says which method survives such ranges, not by how much a method wins.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from examples.moving_digits import sampling
from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic
from qvd_core.plan import quantizable_layers, refuse_quantized
from qvd_core.quality import psnr
from qvd_core.spec import QuantSpec
from qvd_diffusers import QVDConfig, calibrate

BULK_SPREAD = 0.4  # of log range: 95 channels of 100 within a factor of 2.2 of the median
OUTLIER_SHARE = 0.03  # at least one channel per tensor
OUTLIER_RANGE = (20.0, 100.0)  # times the median channel
OFFSET_MEDIAN = 3.0  # standard deviations of the channel
OFFSET_SPREAD = 0.7  # of log offset: one channel in ten beyond 7 standard deviations
MAJORITY_SHARE = 0.85  # of the channels of a tensor are moved in the same direction
# What an estimate of the deviation from weights alone is multiplied by, so that the measured one comes close.
NORM_DEVIATION = 0.6  # of an affine norm's weight: the rest of a channel's square is its mean
SELF_DEVIATION = 0.6  # of a value's row norm: attention averages over the tokens of the clip
CROSS_DEVIATION = 0.05  # ... over a handful of words, much the same for every token
TEXT_DEVIATION = 0.2  # of the row norm of the layer that embeds the words
MARK = "_qvd_stress"  # in the model's config; diffusers keeps names with an underscore without asking

METHODS: dict[str, dict[str, Any]] = {
    "min-max static": {"activation": "static", "shift": False, "scale": "none"},
    "shift only, static": {"activation": "static", "scale": "none"},
    "QVD static": {"activation": "static"},
    "min-max per token": {"activation": "token", "shift": False, "scale": "none"},
    "QVD per token": {"activation": "token"},
}

Spans = dict[str, tuple[Tensor, Tensor]]  # minimum and maximum [K] of the channels of a layer's input, by layer


# ---------------------------------------------------------------------------------------------------------------------
# The transform
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stress(model: nn.Module, seed: int = 0, strength: float = 1.0) -> nn.Module:
    """Give a float32 or float64 denoiser heavy-tailed, asymmetric activations, in place, and the function it had.

    model: a `WanTransformer3DModel` or a `UNetMotionModel`. seed: of all scales and offsets; one seed, one result.
    strength: 0 changes nothing, 1 is the distribution of the constants above; scales are raised to this power, offsets
    multiplied by it. In float32 the output stays within 1e-5 of its largest value up to a strength of 1. The weights
    keep their names, shapes and dtypes, so the result saves and loads like any model; its config remembers the stress.

    Raises QVDError, with nothing changed, for other classes, quantized, 16-bit, fused or adapted models, models not on
    the CPU or stressed before (ranges would multiply and no longer be those said here), a bad seed or strength. [O]
    """
    denoiser: Any = model
    rewrite = _check(denoiser, seed, strength)
    rewrite(denoiser, _Draw(torch.Generator().manual_seed(seed), strength))
    denoiser.register_to_config(**{MARK: {"seed": seed, "strength": strength}})
    return model


class _Draw:
    """The random numbers, one pair of producer and consumers after the other."""

    def __init__(self, generator: torch.Generator, strength: float):
        self.generator, self.strength = generator, strength

    def scale(self, channels: int) -> Tensor:
        """float64 [channels], median about 1: log-normal, and outliers log-uniform in `OUTLIER_RANGE`."""
        log_scale = BULK_SPREAD * self._normal(channels)
        outliers = torch.randperm(channels, generator=self.generator)[: max(1, round(OUTLIER_SHARE * channels))]
        low, high = (math.log(bound) for bound in OUTLIER_RANGE)
        log_scale[outliers] = low + (high - low) * self._uniform(len(outliers))
        return (self.strength * log_scale).exp()

    def offset(self, deviation: Tensor) -> Tensor:
        """float64 [channels] in the unit of `deviation` [channels]: log-normal size, most of them of one sign."""
        size = OFFSET_MEDIAN * (OFFSET_SPREAD * self._normal(len(deviation))).exp()
        majority = 1.0 if self._uniform(1) < 0.5 else -1.0
        sign = torch.where(self._uniform(len(deviation)) < MAJORITY_SHARE, majority, -majority)
        return self.strength * sign * size * deviation

    def _normal(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.generator, dtype=torch.float64)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


def _amplify(producer: Any, scale: Tensor, offset: Tensor | None = None, rows: slice = slice(None)) -> None:
    """Let output channels `rows` of an affine norm or a linear give scale * y + offset instead of y."""
    weight, bias = producer.weight, producer.bias
    selected = weight[rows]
    weight[rows] = (selected.double() * scale.view(-1, *[1] * (selected.ndim - 1))).to(weight)
    if bias is not None:
        moved = bias[rows].double() * scale
        bias[rows] = (moved if offset is None else moved + offset).to(bias)


def _absorb(consumers: Sequence[Any], scale: Tensor, offset: Tensor | None = None) -> None:
    """Let linears (or 1x1 convolutions) that now read scale * x + offset put out what they did for x."""
    for consumer in consumers:
        weight, bias = consumer.weight, consumer.bias
        weight.copy_(weight.double() / scale.view(1, -1, *[1] * (weight.ndim - 2)))
        if offset is not None:
            # With the weight as it was rounded: the offset is taken out exactly as it comes in.
            bias.copy_(bias.double() - weight.double().flatten(1) @ offset)


def _pair(
    producer: Any, consumers: Sequence[Any], draw: _Draw, deviation: float = NORM_DEVIATION, twin: Any = None
) -> None:
    """Stress what `producer` hands to `consumers`, who must be its only readers.

    There is an offset only where every one of them has a bias. It is measured in `deviation` times the weight of a norm
    or the row norm of a linear. A `twin`'s output is added to the producer's before it is read: it shares the scale.
    """
    weight = producer.weight
    scale = draw.scale(len(weight))
    size = weight.double().abs() if weight.ndim == 1 else weight.double().flatten(1).norm(dim=1)
    biased = all(module.bias is not None for module in (producer, *consumers))
    offset = draw.offset(scale * deviation * size) if biased else None
    _amplify(producer, scale, offset)
    if twin is not None:
        _amplify(twin, scale)
    _absorb(consumers, scale, offset)


def _values(attention: Any, draw: _Draw) -> None:
    """to_v to to_out: the weights of an attention sum to 1, so what is added to all values is added to their mean."""
    deviation = CROSS_DEVIATION if attention.is_cross_attention else SELF_DEVIATION
    _pair(attention.to_v, [attention.to_out[0]], draw, deviation, twin=getattr(attention, "add_v_proj", None))


# ---------------------------------------------------------------------------------------------------------------------
# Who reads what, per model class
# ---------------------------------------------------------------------------------------------------------------------


def _stress_wan(model: Any, draw: _Draw) -> None:
    """Wan: the modulated norms, the cross-attention's norm, the attention values and the embedded prompt.

    The input of ffn.net.2 comes from a GELU, that of proj_out from a norm that the time embedding itself modulates:
    there is no exact scale for either.
    """
    embedder, blocks = model.condition_embedder, list(model.blocks)
    for block in blocks:
        _values(block.attn1, draw)
        _values(block.attn2, draw)
        if isinstance(block.norm2, nn.LayerNorm):  # an identity where the config has no cross_attn_norm
            _pair(block.norm2, [block.attn2.to_q], draw)
    readers = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    _pair(embedder.text_embedder.linear_2, readers, draw, TEXT_DEVIATION)
    if embedder.image_embedder is not None and blocks[0].attn2.add_k_proj is not None:
        readers = [layer for block in blocks for layer in (block.attn2.add_k_proj, block.attn2.add_v_proj)]
        _pair(embedder.image_embedder.norm2, readers, draw)
    _modulation(embedder.time_proj, blocks, 0, [_readers(block.attn1) for block in blocks], draw)
    _modulation(embedder.time_proj, blocks, 3, [[block.ffn.net[0].proj] for block in blocks], draw)


def _modulation(time_proj: nn.Linear, blocks: Sequence[Any], row: int, readers: list[list[Any]], draw: _Draw) -> None:
    """The norm that rows `row` (shift) and `row` + 1 (scale) of the tables modulate: norm * (1 + scale) + shift.

    Both rows are sums of a block's table and of one time_proj for all blocks: the blocks must share the scale, as the
    outlier channels of large models are shared, while each has an offset of its own, in its table.
    """
    channels = time_proj.out_features // 6
    shift_rows, scale_rows = (slice(part * channels, (part + 1) * channels) for part in (row, row + 1))
    scale = draw.scale(channels)
    mean_scale = 1 + time_proj.bias[scale_rows].double()  # of the norm, without a block's share and the timestep's
    for block, consumers in zip(blocks, readers, strict=True):
        table = block.scale_shift_table[0]  # [6, channels]
        shift, factor = table[row].double(), table[row + 1].double()
        offset = draw.offset(scale * NORM_DEVIATION * (mean_scale + factor).abs())
        table[row] = (scale * shift + offset).to(table)
        table[row + 1] = (scale * (1 + factor) - 1).to(table)
        _absorb(consumers, scale, offset)
    _amplify(time_proj, scale, rows=shift_rows)
    _amplify(time_proj, scale, rows=scale_rows)


def _stress_unet(model: Any, draw: _Draw) -> None:
    """UNetMotionModel: every transformer, spatial or temporal; convolutions read a SiLU, which has no exact scale."""
    for module in model.modules():
        if type(module).__name__ in ("Transformer2DModel", "AnimateDiffTransformer3D"):
            _pair(module.norm, [module.proj_in], draw)
        elif type(module).__name__ == "BasicTransformerBlock" and module.norm_type == "layer_norm":
            _stress_block(module, draw)


def _stress_block(block: Any, draw: _Draw) -> None:
    """The norms, the attention values and the linear half of the gated feed-forward of one block."""
    both = [(block.norm1, block.attn1), (block.norm2, block.attn2)]
    attentions = [(norm, attention) for norm, attention in both if attention is not None]
    for _, attention in attentions:
        _values(attention, draw)
    if block.pos_embed is None:
        for norm, attention in attentions:
            _pair(norm, _readers(attention), draw)
    else:  # one table of positions is added after both norms, so it is scaled with both
        scale = draw.scale(len(block.norm1.weight))
        block.pos_embed.pe.copy_(block.pos_embed.pe.double() * scale)
        for norm, attention in attentions:
            _amplify(norm, scale)
            _absorb(_readers(attention), scale)
    up, down = block.ff.net[0], block.ff.net[2]
    _pair(block.norm3, [up.proj], draw)
    if type(up).__name__ == "GEGLU":
        scale = draw.scale(down.in_features)
        _amplify(up.proj, scale, rows=slice(0, down.in_features))  # the other half is the gate
        _absorb([down], scale)


def _readers(attention: Any) -> list[Any]:
    """The layers of an attention that read the hidden states, not the prompt."""
    return [attention.to_q] if attention.is_cross_attention else [attention.to_q, attention.to_k, attention.to_v]


REWRITES: dict[str, Callable[[Any, _Draw], None]] = {
    "WanTransformer3DModel": _stress_wan,
    "UNetMotionModel": _stress_unet,
}


def _check(model: Any, seed: int, strength: float) -> Callable[[Any, _Draw], None]:
    """The rewrite for `model`; QVDError where it would not be exact."""
    name = type(model).__name__
    if name not in REWRITES:
        raise QVDError(f"there is no exact stress for {name}; it is written for {' and '.join(REWRITES)}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise QVDError(f"seed must be an integer of at least 0, got {seed!r}.")
    if not (math.isfinite(strength) and strength >= 0):
        raise QVDError(f"strength must be a finite number of at least 0, got {strength!r}.")
    refuse_quantized(model)
    if MARK in model.config:
        raise QVDError(f"this {name} is stressed already ({model.config[MARK]}): load the original to stress it anew.")
    for parameter_name, parameter in model.named_parameters():
        if parameter.element_size() < 4 or parameter.device.type != "cpu":
            found = f"{parameter.dtype} on {parameter.device}"
            raise QVDError(f"{parameter_name} is {found}: load the model in float32 on the CPU to stress it.")
    for module_name, module in model.named_modules():
        if hasattr(module, "base_layer") or isinstance(getattr(module, "processor", None), nn.Module):
            raise QVDError(f"{module_name} has an adapter: unload or merge it before the stress.")
        if getattr(module, "fused_projections", False):
            raise QVDError(f"{module_name} has fused projections: call unfuse_qkv_projections() before the stress.")
    return REWRITES[name]


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The transformer or the UNet of a pipeline."""
    return pipe.transformer if "transformer" in pipe.components else pipe.unet


def stressed_pipeline(name: str, seed: int = 0, strength: float = 1.0, **options: Any) -> DiffusionPipeline:
    """The miniature "wan" or "unet" in full precision, its denoiser stressed. `options` go to `from_pretrained`."""
    pipe = sampling.load_pipeline(sampling.miniature(name), **options)
    stress(denoiser_of(pipe), seed, strength)
    return pipe


def save_stressed(name: str, folder: str | Path, seed: int = 0, strength: float = 1.0) -> Path:
    """Write the stressed miniature to `folder`, for `load_pipeline(folder, quantization_config=...)`; returns it."""
    stressed_pipeline(name, seed, strength).save_pretrained(folder)
    shutil.copy(sampling.miniature(name) / "call.json", folder)
    return Path(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What it does
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranges:
    """How channels of the inputs of a model's int8 layers differ, over all steps, tokens and clips observed."""

    disparity: float  # largest over median half-range of the channels; the median over inputs
    disparity_max: float  # the same of the worst input
    one_sided: float  # share of channels that are never 0 and never change sign
    asymmetric: float  # share of channels whose middle is farther from 0 than half their half-range
    coverage: float  # share of the 255 levels of a static int8 scale per tensor that a channel uses; mean over channels


def measure_ranges(model: nn.Module, run: Callable[[], object]) -> Ranges:
    """Watch the inputs of `model`'s int8 layers (the temporal ones aside) while `run()` samples with it.

    Layers that read one tensor count once. Raises QVDError when `run` never reaches one of the layers.
    """
    family = family_or_generic(model)
    layers = quantizable_layers(model, family, QuantSpec())
    groups = {family.input_group(name): layer for name, layer in layers.items() if not family.is_temporal(name)}
    ranges: Spans = {}
    with ExitStack() as stack:
        for group, layer in groups.items():
            handle = layer.register_forward_pre_hook(partial(_widen, ranges, group), with_kwargs=True)
            stack.callback(handle.remove)
        run()
    if missing := groups.keys() - ranges.keys():
        raise QVDError(f"the run never reached {sorted(missing)[0]}: sample with guidance and a prompt.")
    return _summarize([ranges[group] for group in groups])


def _widen(ranges: Spans, group: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: let `ranges[group]`, minimum and maximum [K] of the channels, contain this input."""
    x = args[0] if args else kwargs["input"]  # AnimateDiff passes `input=`
    x = (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)  # [M, K]
    low, high = x.amin(dim=0), x.amax(dim=0)
    if group in ranges:
        low, high = torch.minimum(low, ranges[group][0]), torch.maximum(high, ranges[group][1])
    ranges[group] = low, high


def _summarize(ranges: Sequence[tuple[Tensor, Tensor]]) -> Ranges:
    """From minimum and maximum [K] of the channels of each input."""
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    half = [(high - low) / 2 for low, high in ranges]
    disparity = torch.stack([channels.max() / channels.median() for channels in half])
    # A static scale per tensor puts max|x| at code 127.
    codes = [(ends * (127 / ends.abs().max())).round() for ends in map(torch.stack, ranges)]
    return Ranges(
        disparity=float(disparity.median()),
        disparity_max=float(disparity.max()),
        one_sided=float((low * high > 0).double().mean()),
        asymmetric=float(((high + low).abs() > (high - low) / 2).double().mean()),
        coverage=float(torch.cat([high - low for low, high in codes]).mean() / 255),
    )


def measure_stress(name: str, seed: int, strength: float, clips: int) -> dict[str, float]:
    """Ranges and PSNR (dB, against the plain model in full precision, same noise) of a stressed miniature in int8."""
    call = sampling.load_call(sampling.miniature(name))
    prompts, seeds = sampling.held_out_prompts(clips), sampling.held_out_seeds(clips)
    reference = sampling.sample_video(sampling.load_pipeline(sampling.miniature(name)), prompts, seeds, call)
    pipe = stressed_pipeline(name, seed, strength)
    videos: list[Tensor] = []
    ranges = measure_ranges(denoiser_of(pipe), lambda: videos.append(sampling.sample_video(pipe, prompts, seeds, call)))
    figures = {**asdict(ranges), "full precision": float(psnr(videos[0], reference).mean())}
    with TemporaryDirectory() as folder:
        save_stressed(name, folder, seed, strength)
        seen = sampling.calibration_prompts()[:clips]
        for method, settings in METHODS.items():
            config = QVDConfig(**settings)
            scales = calibrate(pipe, seen, config=config, cache=False, progress=False, **call)
            quantized = sampling.load_pipeline(Path(folder), quantization_config=QVDConfig(scales=scales, **settings))
            figures[method] = float(psnr(sampling.sample_video(quantized, prompts, seeds, call), reference).mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["save", "measure"], help="write a stressed pipeline, or print what it costs")
    parser.add_argument("miniature", choices=[*sampling.MINIATURES, "both"])
    parser.add_argument("--to", type=Path, default=Path("out/stressed"), help="save to a folder in this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=1.0, help="0: the plain model")
    parser.add_argument("--clips", type=int, default=4, help="to measure on, and as many captions to calibrate on")
    args = parser.parse_args()
    for name in sampling.MINIATURES if args.miniature == "both" else (args.miniature,):
        if args.action == "save":
            print(save_stressed(name, args.to / name, args.seed, args.strength))
            continue
        figures = measure_stress(name, args.seed, args.strength, args.clips)
        lines = (f"{key}: {value:.4g}" for key, value in figures.items())
        print(f"{name}, strength {args.strength}", *lines, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
