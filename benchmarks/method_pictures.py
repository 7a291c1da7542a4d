"""The pictures of docs/method.md, from real runs of the trained miniatures.

    python -m benchmarks.method_pictures             # writes docs/images/method-*.png, about three minutes on one core

Temporal features need no sampling; channel ranges come from one calibration run of the Wan miniature.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.subjects import Subject
from examples.moving_digits import sampling
from qvd_core.channels import Choice, Member, choose, measure
from qvd_core.families import family_or_generic
from qvd_core.observation import Observation
from qvd_core.report.canvas import CHANGE, HEAT, THEMES, colour_bar, label_axes, legend, new_figure, style, to_png
from qvd_core.report.matrices import as_matrix
from qvd_core.spec import QuantSpec
from qvd_core.statistics import InputStatistics
from qvd_core.steps import static_steps
from qvd_core.temporal import TemporalQuantizer, fit_temporal_quantizer, td_correlation, td_ratio, td_score
from qvd_core.temporal_fit import embed_timesteps, grid_features, stack_features
from qvd_core.temporal_metrics import pair_distances
from qvd_core.transform import Transform
from qvd_diffusers.sampling import find_denoiser

OUT = Path("docs/images")
LARGEST_FILE = 120_000  # bytes
THEME = THEMES["light"]
# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#57606a"
TITLES = {"wan": "Wan", "unet": "AnimateDiff"}

TEMPORAL_BITS = 4
SHOWN_QUANTIZERS = ("uniform", "log2", "power")
RANGES_LAYER = "blocks.4.ffn.net.2"  # behind a GELU: one-sided inputs, some channels far wider than others
SEARCHED_LAYERS = (RANGES_LAYER, "blocks.3.attn1.to_q")
SEARCHED_BITS = (8, 6)
STEADY_LAYER = "blocks.4.attn1.to_q"
DRIFTING_LAYERS = 4
MOST_BUCKETS = 8
COLOUR_STEPS = 10  # of a distance: few enough that a palette holds them exactly
SHOWN_CHANNELS = 160


@dataclass(frozen=True)
class Temporal:
    """Temporal features of one miniature: own [T, C] at the sampler's steps, grid [R, C] over all timesteps."""

    name: str
    own: Tensor
    grid: Tensor
    timesteps: list[float]
    quantizers: dict[str, TemporalQuantizer]


@torch.no_grad()
def temporal_features(name: str) -> Temporal:
    """Features of a miniature, and 4-bit quantizers fitted to their grid, without data; "auto" is the search's own."""
    folder = sampling.miniature(name)
    pipe = sampling.load_pipeline(folder)
    model = find_denoiser(pipe)
    family = family_or_generic(model)
    pipe.scheduler.set_timesteps(sampling.load_call(folder)["num_inference_steps"])
    grid = stack_features(grid_features(model, family))
    readers = [module.weight for key, module in model.named_modules() if family.is_temporal(key)]
    projection = torch.cat([weight.detach().float() for weight in readers])
    kinds = (*SHOWN_QUANTIZERS, "auto")
    fitted = {kind: fit_temporal_quantizer(grid, projection, TEMPORAL_BITS, kind).quantizer for kind in kinds}
    timesteps = pipe.scheduler.timesteps
    return Temporal(name, embed_timesteps(model, family, timesteps), grid, timesteps.tolist(), fitted)


# 1: features and codes ----------------------------------------------------------------------------------------------


def draw_codes(features: Sequence[Temporal]) -> bytes:
    """Histograms of the features above the levels of three quantizers, and one channel through each of them."""
    figure = new_figure(860, 470, THEME)
    axes = figure.subplots(3, len(features), height_ratios=(2.2, 1.3, 2), squeeze=False)
    for column, temporal in enumerate(features):
        histogram, levels, trace = axes[:, column]
        lowest, highest = float(temporal.grid.min()), float(temporal.grid.max())
        histogram.hist(
            temporal.grid.flatten().numpy(), bins=80, log=True, color="#8fb8d8", edgecolor=BLUE, linewidth=0.4
        )
        inside = ((temporal.grid > -0.28) & (temporal.grid < 0.3)).float().mean()
        style(histogram, THEME, f"{TITLES[temporal.name]}: features after SiLU")
        words = f"{inside:.0%} of the values lie in [-0.28, 0.3];\nthe largest is {highest:.1f}"
        histogram.text(
            0.97, 0.9, words, transform=histogram.transAxes, ha="right", va="top", fontsize=10, color=THEME.ink
        )
        label_axes(histogram, THEME, y="values (log)")
        _draw_levels(levels, temporal)
        for part in (histogram, levels):
            margin = 0.04 * (highest - lowest)
            part.set_xlim(lowest - margin, highest + margin)
        _draw_trace(trace, temporal)
    return to_png(figure)


def _draw_levels(axes: Any, temporal: Temporal) -> None:
    for row, (kind, colour) in enumerate(zip(SHOWN_QUANTIZERS, (ORANGE, PURPLE, BLUE), strict=True)):
        levels = temporal.quantizers[kind].levels
        axes.plot(levels.numpy(), [row] * len(levels), "|", color=colour, markersize=13, markeredgewidth=1.6)
    style(axes, THEME)
    axes.set_yticks(range(len(SHOWN_QUANTIZERS)), SHOWN_QUANTIZERS)
    axes.set_ylim(len(SHOWN_QUANTIZERS) - 0.4, -0.6)
    label_axes(axes, THEME, f"levels at {TEMPORAL_BITS} bits, on the same axis")


def _draw_trace(axes: Any, temporal: Temporal) -> None:
    """One channel of median movement over all timesteps: what a quantizer makes of it."""
    movement = temporal.grid.std(dim=0)
    channel = int(movement.sort().indices[len(movement) // 2])
    times = range(1000, -1, -1)  # the grid of 1001 timesteps
    axes.plot(times, temporal.grid[:, channel].numpy(), color=GREY, linewidth=2.4, label="full precision")
    for kind, colour, dashes in (("uniform", ORANGE, "--"), ("power", BLUE, "-")):
        decoded = temporal.quantizers[kind](temporal.grid)[:, channel]
        axes.plot(
            times, decoded.numpy(), color=colour, linewidth=1.5, linestyle=dashes, label=kind, drawstyle="steps-mid"
        )
    style(axes, THEME)
    axes.set_xlim(1000, 0)
    label_axes(axes, THEME, f"timestep, in sampling order (channel {channel}, of median movement)", "value")
    legend(axes, THEME, loc="best", ncols=3, columnspacing=1, handlelength=1.6)


# 2: distances between timesteps -------------------------------------------------------------------------------------


def draw_distances(features: Sequence[Temporal]) -> bytes:
    """Per miniature: the distances between the sampler's timesteps, and how each quantizer changes them."""
    from matplotlib import colormaps

    kinds = (*SHOWN_QUANTIZERS, "auto")
    figure = new_figure(900, 440, THEME)
    rows = figure.subplots(len(features), 1 + len(kinds), squeeze=False)
    for axes, temporal in zip(rows, features, strict=True):
        count = len(temporal.timesteps)
        exact = torch.tensor(as_matrix(pair_distances(temporal.own).tolist(), count))
        image = axes[0].imshow(exact, cmap=colormaps[HEAT].resampled(COLOUR_STEPS), vmin=0, vmax=1)
        axes[0].set_title(f"{TITLES[temporal.name]}, full precision", fontsize=10.5, color=THEME.ink)
        axes[0].set_xlabel(f"TDScore {td_score(temporal.own):.3f}", fontsize=10, color=THEME.ink)
        colour_bar(figure, axes[0], image, "distance", THEME)
        changes = []
        for axis, kind in zip(axes[1:], kinds, strict=True):
            quantizer = temporal.quantizers[kind]
            rounded = quantizer(temporal.own)
            change = torch.tensor(as_matrix(pair_distances(rounded).tolist(), count)) - exact
            changes.append(axis.imshow(change, cmap=colormaps[CHANGE].resampled(COLOUR_STEPS + 1), vmin=-0.2, vmax=0.2))
            label = kind if kind != "auto" else f"chosen: {quantizer.name}"
            axis.set_title(label, fontsize=10.5, color=THEME.ink)
            ratio, correlation = td_ratio(temporal.own, rounded), td_correlation(temporal.own, rounded)
            words = f"TDScore {td_score(rounded):.3f}\nTDR {ratio:.3f}, TDC {correlation:.4f}"
            axis.set_xlabel(words, fontsize=10, color=THEME.ink)
        colour_bar(figure, axes[1:].tolist(), changes[0], "its change", THEME)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_yticks([0, count - 1], [f"t={temporal.timesteps[0]:.0f}", f"t={temporal.timesteps[-1]:.0f}"])
        axes[0].tick_params(labelsize=9, labelcolor=THEME.faint, length=0)
    return to_png(figure, faithful=True)


# 3: one layer's channels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer input of the Wan miniature, and the layers that read it."""

    name: str
    statistics: InputStatistics
    members: list[Member]


def layer_of(observation: Observation, name: str) -> Layer:
    """What calibration saw of one layer input."""
    statistics = observation.statistics(name, torch.device("cpu"))
    assert statistics is not None
    members = []
    for reader in observation.groups[name]:
        weight, bias = observation.weights(reader)
        members.append(Member(weight.detach().float(), None if bias is None else bias.detach().float()))
    return Layer(name, statistics, members)


def shifted(statistics: InputStatistics) -> tuple[Transform, Tensor]:
    """The mid-range shift of METHOD 3.2, and the half-ranges a_c [K] it leaves."""
    middle = (statistics.maximum + statistics.minimum) / 2
    half = (statistics.maximum - statistics.minimum) / 2
    return Transform("mid", middle, torch.ones_like(middle)), half


def scaled(statistics: InputStatistics, threshold: float) -> Transform:
    """METHOD 3.3: behind the mid-range shift, every channel wider than the threshold is brought to it exactly."""
    transform, half = shifted(statistics)
    return replace(transform, name=f"t={threshold:.2f}", scale=(half / threshold).clamp(min=1.0))


def draw_channels(layer: Layer) -> bytes:
    """Channel ranges scattered, shifted and scaled into one range, and the levels each channel uses."""
    statistics = layer.statistics
    half = shifted(statistics)[1]
    threshold = _best_threshold(layer, QuantSpec(activation="static", range="minmax"))
    stages = [
        ("1. as they are: scattered", Transform.identity(statistics.channels), ORANGE),
        ("2. shifted: x - z", shifted(statistics)[0], PURPLE),
        (f"3. scaled: (x - z) / s, t = {threshold:.2f}", scaled(statistics, threshold), BLUE),
    ]
    order = half.sort(descending=True).indices
    order = order[torch.linspace(0, len(order) - 1, min(SHOWN_CHANNELS, len(order))).round().long()]
    figure = new_figure(900, 420, THEME)
    axes = figure.subplots(2, len(stages), height_ratios=(1.5, 1), sharey="row")
    for column, (title, transform, colour) in enumerate(stages):
        low = ((statistics.minimum - transform.shift) / transform.scale)[order]
        high = ((statistics.maximum - transform.shift) / transform.scale)[order]
        reach = float(torch.maximum(low.abs(), high.abs()).max())
        upper, lower = axes[:, column]
        upper.bar(range(len(order)), (high - low).numpy(), 1.0, bottom=low.numpy(), color=colour)
        for edge in (-reach, reach):
            upper.axhline(edge, color=GREY, linewidth=1, linestyle="--")
        style(upper, THEME, title)
        levels = 255 * (high - low) / (2 * reach)
        lower.bar(range(len(order)), levels.numpy(), 1.0, color=colour)
        lower.axhline(255, color=GREY, linewidth=1, linestyle="--")
        style(lower, THEME)
        lower.set_title(f"mean {float(levels.mean()):.0f} of 255 levels", loc="left", fontsize=10.5, color=THEME.ink)
        first = column == 0
        label_axes(upper, THEME, y="range; dashed: of the\nwhole tensor" if first else "")
        beside = "levels a channel\ncan use" if first else ""
        label_axes(lower, THEME, f"{len(order)} of {len(half)} channels, the widest first", beside)
    figure.suptitle(f"Input of {layer.name}, Wan", x=0.01, ha="left", fontsize=11, color=THEME.faint)
    return to_png(figure)


# 4: the search for t ------------------------------------------------------------------------------------------------


def error_of(layer: Layer, transform: Transform, spec: QuantSpec) -> float:
    """Relative output error of the layers that read an input, summed, under the deployed quantizers (METHOD 3.4)."""
    # A search that is allowed one transform only still finds the static step that goes with it.
    choice = choose(layer.statistics, layer.members, spec, lambda _: transform)
    return _error(layer, choice, spec)


def _error(layer: Layer, choice: Choice, spec: QuantSpec) -> float:
    qualities = [measure(layer.statistics, member, choice, spec) for member in layer.members]
    return sum(10 ** (-quality.sqnr_db / 10) for quality in qualities)


def _candidate_thresholds(statistics: InputStatistics) -> list[float]:
    """The thresholds that SCRI's search tries: from the mean half-range towards the largest."""
    half = shifted(statistics)[1]
    low, high = float(half.mean()), float(half.max())
    return [low + share * (high - low) for share in (0.0, 0.25, 0.5, 0.75)]


def _best_threshold(layer: Layer, spec: QuantSpec) -> float:
    thresholds = _candidate_thresholds(layer.statistics)
    return min(thresholds, key=lambda threshold: error_of(layer, scaled(layer.statistics, threshold), spec))


@dataclass(frozen=True)
class Curve:
    """Output error over the threshold t of one layer input at one bit-width; errors relative to no transform at all."""

    layer: str
    bits: int
    widest: float
    thresholds: list[float]
    errors: list[float]
    tried: list[tuple[float, float]]
    chosen: str
    chosen_error: float


def curve_of(layer: Layer, bits: int) -> Curve:
    """Dense in t, for static scales; the search's own choice beside it."""
    spec = QuantSpec(weight_bits=bits, activation_bits=bits, activation="static", rounding="nearest")
    statistics = layer.statistics
    half = shifted(statistics)[1]
    plain = error_of(layer, Transform.identity(statistics.channels), spec)
    thresholds = torch.logspace(math.log10(float(half.max()) * 0.05), math.log10(float(half.max())), 41).tolist()
    tried = _candidate_thresholds(statistics)
    both = {t: error_of(layer, scaled(statistics, t), spec) / plain for t in (*thresholds, *tried)}
    choice = choose(statistics, layer.members, spec)
    return Curve(
        layer.name,
        bits,
        float(half.max()),
        thresholds,
        [both[t] for t in thresholds],
        [(t, both[t]) for t in tried],
        choice.transform.name,
        _error(layer, choice, spec) / plain,
    )


def draw_search(curves: Sequence[Curve]) -> bytes:
    """Error over t, one panel per layer and bit-width."""
    figure = new_figure(900, 520, THEME)
    axes = figure.subplots(2, 2).flatten()
    for axis, curve in zip(axes, curves, strict=True):
        axis.plot(curve.thresholds, curve.errors, color=BLUE, linewidth=2, label="mid-range shift, scaled to t")
        times, errors = zip(*curve.tried, strict=True)
        axis.plot(times, errors, "o", color="white", markeredgecolor=BLUE, markersize=8, label="what the search tries")
        best = min(curve.tried, key=lambda point: point[1])
        axis.plot(*best, "*", color=ORANGE, markersize=15, label="the best of them", zorder=5)
        axis.axhline(1.0, color=GREY, linewidth=1.2, linestyle="--", label="no shift, no scale")
        axis.axhline(curve.chosen_error, color=GREEN, linewidth=1.4, linestyle=":", label="the whole search's choice")
        style(axis, THEME, f"{curve.layer}, W{curve.bits}A{curve.bits}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(0.6 * min(curve.errors), 1.3 * max(1.0, *curve.errors))
        shares = [share for share in (0.05, 0.1, 0.2, 0.5, 1.0) if share > 0.6 * min(curve.errors)]
        axis.set_yticks(shares, [f"{share:g}" for share in shares])
        ticks = [curve.widest * share for share in (0.05, 0.1, 0.2, 0.5, 1.0)]
        axis.set_xticks(ticks, [f"{tick:.1f}" for tick in ticks])
        axis.minorticks_off()
        words = f"choice: {curve.chosen}"
        axis.text(0.02, 0.72, words, transform=axis.transAxes, fontsize=10.5, color=GREEN)
    for number, axis in enumerate(axes):
        below = "threshold t; right end: the widest channel, no scaling" if number > 1 else ""
        beside = "output error, share of\nthat without a transform" if number % 2 == 0 else ""
        label_axes(axis, THEME, below, beside)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10, labelcolor=THEME.ink
    )
    return to_png(figure)


# 5: drift -----------------------------------------------------------------------------------------------------------


def draw_drift(observation: Observation) -> bytes:
    """Ranges over the sampling steps, and one of them under one range, and under several."""
    reaches = {}
    for name, observer in observation.inputs.items():
        buckets = observer.ranges.buckets
        if observer.count and len(buckets) > 1:
            limits = [torch.maximum(bucket.minimum.abs(), bucket.maximum.abs()).amax() for bucket in buckets]
            reaches[name] = torch.stack(limits)
    share = {name: float(reach.min() / reach.max()) for name, reach in reaches.items()}
    moving = sorted(share, key=lambda name: share[name])[:DRIFTING_LAYERS]
    figure = new_figure(900, 330, THEME)
    left, right = figure.subplots(1, 2)
    lines = zip((*moving, STEADY_LAYER), (ORANGE, PURPLE, GREEN, BLUE, GREY), "osD^v", strict=True)
    for name, colour, marker in lines:
        times = [bucket.first for bucket in observation.inputs[name].ranges.buckets]
        values = (reaches[name] / reaches[name].max()).tolist()
        left.plot(times, values, color=colour, marker=marker, markersize=5, label=name)
    style(left, THEME, "Ranges move while sampling", grid="y")
    left.set_ylim(0, 1.05)
    label_axes(left, THEME, "timestep, in sampling order", "range, share of its largest")
    legend(left, THEME, loc="center right", bbox_to_anchor=(1, 0.53))
    _draw_buckets(right, observation, moving[0], reaches[moving[0]])
    for axis in (left, right):
        axis.set_xlim(1010, -10)
    return to_png(figure)


def _draw_buckets(axes: Any, observation: Observation, name: str, reach: Tensor) -> None:
    statistics = observation.statistics(name, torch.device("cpu"))
    assert statistics is not None and statistics.bucket_times is not None
    times = statistics.bucket_times[:, 0]
    steps = static_steps(statistics, Transform.identity(statistics.channels), 8, MOST_BUCKETS)
    one = float(steps.step) * 127
    edges = [-10.0, *steps.bucket_boundaries.tolist(), 1010.0]
    several = (steps.bucket_steps * 127).tolist()
    axes.bar(
        times.numpy(), reach.numpy(), 22, color="#8fb8d8", edgecolor=BLUE, linewidth=0.6, label="what the step needs"
    )
    axes.axhline(one, color=ORANGE, linewidth=1.8, linestyle="--", label="one range for all steps")
    axes.stairs(
        several, edges, color=BLUE, linewidth=1.8, baseline=None, label=f"{len(several)} ranges, cut where it drifts"
    )
    least = int(reach.argmin())
    words = f"one range leaves this step\n{255 * float(reach[least]) / one:.0f} of 255 levels"
    place = (float(times[least]), float(reach[least]))
    arrow = {"arrowstyle": "->", "color": THEME.ink}
    axes.annotate(words, place, (0.53, 0.4), textcoords="axes fraction", arrowprops=arrow, fontsize=10, color=THEME.ink)
    style(axes, THEME, f"Input of {name}")
    axes.set_ylim(0, one * 1.45)
    label_axes(axes, THEME, "timestep, in sampling order", "largest |x|")
    legend(axes, THEME, loc="upper left")


# 6: where shift and scale go ----------------------------------------------------------------------------------------

TITLE_LINE = 0.2
LANES: Sequence[tuple[str, Sequence[tuple[str, str, bool]]]] = (
    (
        "default, every layer",
        (
            ("any producer", "x", False),
            ("quantize kernel", "q = round(x · m + n)\nm = 1/(sΔ), n = -z/(sΔ)", True),
            ("int8 layer", "W' = W · diag(s)\nb' = b + W z", True),
        ),
    ),
    (
        "portable: norm",
        (
            ("affine norm", "γ' = γ/s\nβ' = (β - z)/s", True),
            ("quantize kernel", "q = round(x / Δ)", False),
            ("to_q, to_k, to_v", "W' = W · diag(s)\nb' = b + W z", True),
        ),
    ),
    (
        "portable: value",
        (
            ("to_v", "W' = diag(1/s) W\nb' = (b - z)/s", True),
            ("softmax attention, kernel", "rows sum to 1:\nz and s pass through", False),
            ("to_out", "W' = W · diag(s)\nb' = b + W z", True),
        ),
    ),
)


def draw_folds() -> bytes:
    """A diagram of who computes (x - z)/s: the quantize kernel, or the layer before."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = new_figure(860, 330, THEME)
    axes = figure.subplots()
    axes.set_axis_off()
    centred: dict[str, Any] = {"ha": "center", "va": "center", "color": THEME.ink}
    width, height, pitch, row_pitch, left = 2.2, 0.74, 2.75, 0.95, 1.85
    for row, (label, boxes) in enumerate(LANES):
        y = -row * row_pitch
        axes.text(0, y, label, va="center", fontsize=12, fontweight="bold", color=THEME.ink)
        for column, (title, formula, changed) in enumerate(boxes):
            x = left + column * pitch
            paper, edge = ("#dcebf7", BLUE) if changed else ("#f6f7f9", "#a3abb5")
            shape = "round,pad=0,rounding_size=0.08"
            box = FancyBboxPatch(
                (x, y - height / 2), width, height, shape, facecolor=paper, edgecolor=edge, linewidth=1.4
            )
            axes.add_patch(box)
            middle, lines = x + width / 2, title.count("\n")
            head = y + 0.31 - 0.5 * TITLE_LINE
            axes.text(middle, head, title.split("\n")[0], **centred, fontsize=11, fontweight="bold")
            for number, line in enumerate([*title.split("\n")[1:], *formula.split("\n")], 1):
                weight = "bold" if number <= lines else "normal"
                axes.text(middle, head - number * TITLE_LINE, line, **centred, fontsize=10.5, fontweight=weight)
            if column:
                start = (x - pitch + width + 0.04, y)
                arrow = FancyArrowPatch(start, (x - 0.04, y), arrowstyle="-|>", mutation_scale=13, color=GREY)
                axes.add_patch(arrow)
    words = "blue: changed by SCRI; grey: as it was.  z, s: shift and scale per channel; Δ: scale of the tensor or row"
    axes.text(0, -len(LANES) * row_pitch + 0.42, words, fontsize=10.5, color=THEME.faint, va="top")
    axes.set_xlim(-0.05, left + 2 * pitch + width + 0.1)
    axes.set_ylim(-len(LANES) * row_pitch + 0.2, 0.42)
    return to_png(figure)


# All of them --------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, Callable[[], bytes]]:
    """Name -> what draws it; data that several need is made once."""
    features = [temporal_features(name) for name in sampling.MINIATURES]
    observation = Subject("wan", clips=1).observation()
    return {
        "codes": lambda: draw_codes(features),
        "distances": lambda: draw_distances(features),
        "channels": lambda: draw_channels(layer_of(observation, RANGES_LAYER)),
        "search": lambda: draw_search(
            [curve_of(layer_of(observation, name), bits) for name in SEARCHED_LAYERS for bits in SEARCHED_BITS]
        ),
        "drift": lambda: draw_drift(observation),
        "folds": draw_folds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write to ({OUT})")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine.facts(torch.device("cpu")))
    for name, draw in pictures().items():
        path = args.out / f"method-{name}.png"
        path.write_bytes(draw())
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
        if path.stat().st_size > LARGEST_FILE:
            raise SystemExit(f"{path} is larger than {LARGEST_FILE / 1000:.0f} kB: draw less into it.")


if __name__ == "__main__":
    main()
