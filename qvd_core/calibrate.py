"""Calibration: watch a model while it samples, then choose every scale. The model is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.channels import InputStatistics, Member, Transform, choose_transform, measure
from qvd_core.errors import QVDError
from qvd_core.families import Family, family_or_generic
from qvd_core.fingerprint import content_fingerprint, structure_fingerprint, weight_probe
from qvd_core.observe import FeatureObserver, InputObserver
from qvd_core.plan import layer_spec, quantizable_layers, refuse_quantized
from qvd_core.scales import LayerScales, Scales
from qvd_core.spec import QuantSpec
from qvd_core.temporal_fit import fit_codebook, grid_features, stack_features

Progress = Callable[[int, int, str], None]  # done, total, what

model_fingerprint = content_fingerprint


class _Watch:
    """Everything that is recorded while the model samples, and the hooks that record it."""

    def __init__(self, model: nn.Module, family: Family, layers: dict[str, nn.Module]):
        self.model = model
        self.family = family
        self.timestep = 0.0
        self.calls = 0
        generator = torch.Generator().manual_seed(0)
        self.temporal = [name for name in layers if family.is_temporal(name)]
        self.features = {name: FeatureObserver() for name in self.temporal}
        # Layers that read one tensor are watched once, through the first of them.
        self.groups: dict[str, list[str]] = {}
        for name in layers:
            if name not in self.features:
                self.groups.setdefault(family.input_group(name), []).append(name)
        self.inputs = {names[0]: InputObserver(layers[names[0]], generator) for names in self.groups.values()}
        self._signature = inspect.signature(model.forward)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Attach the hooks; always take them off again."""
        modules = dict(self.model.named_modules())
        handles = [self.model.register_forward_pre_hook(self._on_model, with_kwargs=True)]
        for name, observer in self.inputs.items():
            handles.append(modules[name].register_forward_pre_hook(_on_input(observer.observe), with_kwargs=True))
        for name, feature in self.features.items():
            hook = _on_input(partial(self._observe_feature, feature))
            handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        timestep = bound.get(self.family.timestep_argument)
        if timestep is not None:
            self.timestep = float(torch.as_tensor(timestep).flatten()[0])
        self.calls += 1

    def _observe_feature(self, observer: FeatureObserver, x: Tensor) -> None:
        observer.observe(self.timestep, x)


def _on_input(observe: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that hands on the layer's input, however it was passed (AnimateDiff says `input=`)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(args[0] if args else kwargs["input"])

    return hook


@torch.no_grad()
def calibrate_model(
    model: nn.Module,
    run: Callable[[], object],
    spec: QuantSpec | None = None,
    progress: Progress | None = None,
    calibrated_on: dict[str, Any] | None = None,
) -> Scales:
    """Observe `model` while `run()` samples with it, and choose its scales for `spec`.

    `run` is any callable that calls the model over all steps it will be used at, with and without guidance text.
    `progress(done, total, layer)` is called while scales are searched. `calibrated_on` is remembered in the result.
    Raises QVDError when the model is no video denoiser, is quantized already, holds NaN, was never called by `run`,
    or sees NaN. Whatever happens, the model is left as it was.
    """
    spec = spec or QuantSpec()
    refuse_quantized(model)
    family = family_or_generic(model)
    layers = quantizable_layers(model, family, spec)
    if not layers:
        raise QVDError(f"{type(model).__name__} has no layer that QVD can quantize: nothing was calibrated.")
    check_finite_weights(layers)
    watch = _Watch(model, family, layers)
    with watch.watching():
        run()
    if watch.calls == 0:
        raise QVDError("the calibration run never called the model: pass prompts or a callable that samples with it.")
    scales = Scales(type(model).__name__, structure_fingerprint(model), spec, calibrated_on=dict(calibrated_on or {}))
    scales.calibrated_on.setdefault("forward_passes", watch.calls)
    _fit_temporal(watch, layers, scales)
    _search_transforms(watch, layers, scales, progress)
    return scales


def check_finite_weights(layers: dict[str, nn.Module]) -> None:
    """Raise QVDError naming the first layer whose weight or bias holds NaN or infinity."""
    for name, module in layers.items():
        for kind, tensor in module.named_parameters(recurse=False):
            check_finite(f"{name}.{kind}", tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise QVDError when a weight or bias holds NaN or infinity."""
    if tensor.element_size() < 2:
        tensor = tensor.float()  # 8-bit floats have no test of their own
    if not torch.isfinite(tensor).all():
        raise QVDError(f"{name} holds NaN or infinity: the model file is damaged or overflowed in 16 bits.")


def _fit_temporal(watch: _Watch, layers: dict[str, nn.Module], scales: Scales) -> None:
    """One HTDQ codebook for all temporal projections that read the same features. METHOD section 2.

    Fitted to the observed steps and, where they can be computed, to a grid between them: another sampler or number of
    steps must not fall outside the codebook.
    """
    if scales.spec.temporal == "none":
        return
    between = grid_features(watch.model, watch.family) if watch.features else {}
    groups: list[tuple[Tensor, list[str]]] = []
    for name, observer in watch.features.items():
        if not observer.features:
            continue
        features = stack_features({**between, **observer.features})
        _check_observed(name, features)
        same = next((names for known, names in groups if torch.equal(known, features)), None)
        if same is None:
            groups.append((features, [name]))
        else:
            same.append(name)
    for features, names in groups:
        quantizer, report = fit_codebook(features, [layers[name] for name in names], scales.spec)
        for name in names:
            scales.temporal[name] = quantizer
            scales.report[name] = dict(report)


def _search_transforms(watch: _Watch, layers: dict[str, nn.Module], scales: Scales, progress: Progress | None) -> None:
    for done, names in enumerate(watch.groups.values()):
        if progress is not None:
            progress(done, len(watch.groups), names[0])
        observer = watch.inputs[names[0]]
        if observer.count == 0:
            continue  # never reached by this run; the plan decides whether that matters
        statistics = _statistics(names[0], observer)
        members = {name: _member(layers[name]) for name in names}
        spec = layer_spec(watch.family, names[0], scales.spec)
        transform = choose_transform(statistics, list(members.values()), spec)
        for name, member in members.items():
            scales.layers[name] = LayerScales(
                input_min=statistics.minimum,
                input_max=statistics.maximum,
                input_mean=statistics.mean,
                input_shift=transform.shift,
                input_scale=transform.scale,
                weight_probe=weight_probe(member.weight),
            )
            scales.report[name] = _figures(statistics, member, transform, spec)
    if progress is not None:
        progress(len(watch.groups), len(watch.groups), "done")


def _figures(statistics: InputStatistics, member: Member, transform: Transform, spec: QuantSpec) -> dict[str, float]:
    identity = Transform.identity(len(transform.shift))
    before, after = (measure(statistics, member, choice, spec) for choice in (identity, transform))
    return {
        "sqnr_db_before": before.sqnr_db,
        "sqnr_db": after.sqnr_db,
        "coverage_before": before.coverage,
        "coverage": after.coverage,
    }


def _statistics(name: str, observer: InputObserver) -> InputStatistics:
    assert observer.minimum is not None and observer.maximum is not None
    low, high = observer.minimum.cpu(), observer.maximum.cpu()
    _check_observed(name, low)
    _check_observed(name, high)
    return InputStatistics(low, high, observer.mean.cpu(), observer.rows)


def _check_observed(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise QVDError(
            f"the input of layer {name} held NaN or infinity during calibration: "
            "check that the model samples a sound video in this dtype (bfloat16 or float32) first."
        )


def _member(module: nn.Module) -> Member:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    return Member(weight.detach().float().cpu(), bias.detach().float().cpu() if isinstance(bias, Tensor) else None)
