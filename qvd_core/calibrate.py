"""Calibration: watch a model while it samples, then choose every scale. The model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.channels import Choice, InputStatistics, Member, Transform, choose, measure
from qvd_core.checks import check_finite_weights
from qvd_core.convert import quantized_layer
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.fingerprint import structure_fingerprint, weight_probe
from qvd_core.folds import fold_sites
from qvd_core.observation import Observation, check_observed, watch
from qvd_core.plan import layer_spec, plan_layers
from qvd_core.report.observed import summarize
from qvd_core.scales import LayerScales, Scales
from qvd_core.sensitivity import END_EFFECT, end_effects
from qvd_core.spec import QuantSpec
from qvd_core.steps import static_steps
from qvd_core.temporal import StackedWeights
from qvd_core.temporal_fit import count_outputs, fit_codebook, stack_features
from qvd_core.weight_source import read_finite

Progress = Callable[[int, int, str], None]  # done, total, what


@torch.no_grad()
def calibrate_model(
    model: nn.Module,
    run: Callable[[], object],
    spec: QuantSpec | None = None,
    progress: Progress | None = None,
    calibrated_on: dict[str, Any] | None = None,
    sensitivity: bool | None = None,
) -> Scales:
    """Observe `model` while `run()` samples with it, and choose its scales for `spec`.

    `run` is any callable that calls the model over all steps it will be used at, with and without guidance text.
    `progress(done, total, layer)` is called while scales are searched. `calibrated_on` is remembered in the result.
    sensitivity: also measure what each layer alone does to the output (a few forward passes per layer); default: when
        `spec.auto_keep` asks for it.
    Raises QVDError when the model is no video denoiser, is quantized already, holds NaN, was never called by `run`,
    or sees NaN. Whatever happens, the model is left as it was.
    """
    spec = spec or QuantSpec()
    return search_scales(observe_model(model, run, spec), spec, progress, calibrated_on, sensitivity)


def observe_model(model: nn.Module, run: Callable[[], object], spec: QuantSpec | None = None) -> Observation:
    """The first half of `calibrate_model`: what `search_scales` needs, for any spec with the same layers.

    Of `spec` only the layers to leave out matter.
    """
    observation = Observation.of(model, spec or QuantSpec())
    check_finite_weights(observation.layers)
    watch([observation], run)
    return observation


@torch.no_grad()
def search_scales(
    observation: Observation,
    spec: QuantSpec,
    progress: Progress | None = None,
    calibrated_on: dict[str, Any] | None = None,
    sensitivity: bool | None = None,
    figures: dict[str, dict[str, float]] | None = None,
) -> Scales:
    """The second half of `calibrate_model`: choose every scale for `spec` from what was observed.

    figures: a dict that becomes the report of the result, for those who want to see each layer as it is found.
    """
    model = observation.model
    scales = Scales(type(model).__name__, structure_fingerprint(model), spec, calibrated_on=dict(calibrated_on or {}))
    scales.report = scales.report if figures is None else figures
    scales.calibrated_on.setdefault("forward_passes", observation.passes)
    _fit_temporal(observation, scales)
    _search_transforms(observation, scales, progress)
    if sensitivity is None:
        sensitivity = spec.auto_keep is not None
    if sensitivity:
        _measure_sensitivity(observation, scales, progress)
    scales.observed = summarize(observation, scales)
    return scales


def _fit_temporal(observation: Observation, scales: Scales) -> None:
    """One HTDQ codebook for all temporal projections that read the same features. METHOD section 2.

    Fitted to the observed steps and, where they can be computed, to a grid between them: another sampler or number of
    steps must not fall outside the codebook. Where the features also hold the prompt, there is no such grid, and a
    codebook of the prompts that were seen costs others more than it gives: "auto" leaves those features as they are,
    as without data (measured on random models: 2 to 6 dB at the output). [O]
    """
    if scales.spec.temporal == "none" or (scales.spec.temporal_quantizer == "auto" and not observation.grid):
        return
    groups: list[tuple[Tensor, list[str]]] = []
    for name, observer in observation.features.items():
        if not observer.features:
            continue
        features = stack_features({**(observation.grid or {}), **observer.features})
        check_observed(name, features)
        same = next((names for known, names in groups if torch.equal(known, features)), None)
        if same is None:
            groups.append((features, [name]))
        else:
            same.append(name)
    for features, names in groups:
        weights = (read_finite(observation.weights, name)[0] for name in names)
        rows = count_outputs(observation.layers[name] for name in names)
        quantizer, report = fit_codebook(features, StackedWeights(rows, weights), scales.spec)
        for name in names:
            scales.temporal[name] = quantizer
            scales.report[name] = dict(report)


def _search_transforms(observation: Observation, scales: Scales, progress: Progress | None) -> None:
    allowed = _foldable_parts(observation) if scales.spec.portable else {}
    for done, (first, names) in enumerate(observation.groups.items()):
        if progress is not None:
            progress(done, len(observation.groups), first)
        if observation.inputs[first].count == 0:
            continue  # never reached by this run; the plan decides whether that matters
        members = {name: _member(observation, name) for name in names}
        statistics = observation.statistics(first, members[first].weight.device)
        assert statistics is not None
        spec = layer_spec(observation.family, first, scales.spec)
        choice = choose(statistics, list(members.values()), spec, allowed.get(first))
        if spec.compensates_rounding:
            scales.rows[first] = statistics.rows.to("cpu", torch.bfloat16)
        shared = _shared_scales(statistics, choice, observation.inputs[first].frame_order)
        shared["rows_of"] = first if spec.compensates_rounding else ""
        for name, member in members.items():
            scales.layers[name] = LayerScales(weight_probe=weight_probe(member.weight), **shared)
            scales.report[name] = _figures(statistics, member, choice, spec)
    if progress is not None:
        progress(len(observation.groups), len(observation.groups), "done")


def _foldable_parts(observation: Observation) -> dict[str, Callable[[Transform], Transform]]:
    """By each group's first layer: what of a transform can move into the producer of the group's input."""
    sites = {frozenset(site.consumers): site for site in fold_sites(observation.model, observation.family)}
    return {
        first: sites[frozenset(names)].restrict if frozenset(names) in sites else Transform.without_effect
        for first, names in observation.groups.items()
    }


def _shared_scales(statistics: InputStatistics, choice: Choice, frame_order: str | None) -> dict[str, Any]:
    """What all layers of a group have in common, as fields of `LayerScales`."""
    transform, steps = choice.transform, choice.steps
    tensors = {
        "input_min": statistics.minimum,
        "input_max": statistics.maximum,
        "input_mean": statistics.mean,
        "input_shift": transform.shift,
        "input_scale": transform.scale,
        "static_step": steps.step,
        "bucket_steps": steps.bucket_steps,
        "bucket_boundaries": steps.bucket_boundaries,
        "frame_steps": steps.frame_steps,
    }
    kept = {name: None if tensor is None else tensor.float().cpu() for name, tensor in tensors.items()}
    return {**kept, "frame_order": frame_order or "", "rotation": transform.rotation}


def _figures(statistics: InputStatistics, member: Member, choice: Choice, spec: QuantSpec) -> dict[str, float]:
    identity = Transform.identity(statistics.channels, statistics.mean.device)
    untouched = Choice(identity, static_steps(statistics, identity, spec.activation_bits, spec.buckets))
    before, after = (measure(statistics, member, option, spec) for option in (untouched, choice))
    return {
        "sqnr_db_before": before.sqnr_db,
        "sqnr_db": after.sqnr_db,
        "coverage_before": before.coverage,
        "coverage": after.coverage,
    }


def _measure_sensitivity(observation: Observation, scales: Scales, progress: Progress | None) -> None:
    """Put the end effect of every layer that would be quantized into the report."""
    if observation.running is not observation.model:
        raise QVDError("the effect of each layer can only be measured on a full-precision model that is in memory.")
    spec = replace(scales.spec, auto_keep=None, portable=False)  # one layer alone folds into no producer
    encoding = Encoding(plan_layers(observation.model, spec, scales), spec, scales)

    def quantized(name: str) -> nn.Module:
        layer = quantized_layer(name, observation.layers[name], encoding, observation.weights(name))
        layer.clock = observation.clock
        return layer

    measurable = [name for name in encoding.plan if name in scales.layers or name in scales.temporal]
    makers = {name: partial(quantized, name) for name in measurable}
    hook = observation.model.register_forward_pre_hook(observation.clock.read, with_kwargs=True)
    try:
        effects = end_effects(observation.model, observation.calls, makers, progress)
    finally:
        hook.remove()
    for name, decibels in effects.items():
        scales.report.setdefault(name, {})[END_EFFECT] = decibels


def _member(observation: Observation, name: str) -> Member:
    weight, bias = read_finite(observation.weights, name)
    return Member(weight.float(), None if bias is None else bias.float())
