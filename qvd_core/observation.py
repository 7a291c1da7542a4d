"""Watching a model while it samples: everything the search for scales needs, recorded by hooks that leave no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.clock import SamplingClock
from qvd_core.errors import QVDError
from qvd_core.families import Family, family_or_generic
from qvd_core.observe import FeatureObserver, InputObserver
from qvd_core.plan import quantizable_layers, refuse_altered, refuse_quantized
from qvd_core.spec import QuantSpec
from qvd_core.statistics import InputStatistics
from qvd_core.temporal_fit import grid_features
from qvd_core.weight_source import WeightSource, own_weights

CALLS_KEPT = 4  # forward passes that are remembered whole, to measure what each layer does to the model's output


class Observation:
    """What was seen of a model's layer inputs, temporal features and calls.

    model, family, layers: the float model and its quantizable layers, by name; its tensors may be on meta.
    running: the model that samples, with the same modules and the same names; usually `model` itself.
    weights: where the float weights of the layers are.
    groups: first layer that reads an input -> all layers that read it. inputs: its observer, by that first layer.
    features: observers of the temporal projections' inputs. grid: the features between the timesteps that were seen,
        from the model's own timestep embedding; None before the first pass.
    passes: how many forward passes were seen.
    calls: a few (args, kwargs) of the model's forward, spread evenly over the run.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        layers: dict[str, nn.Module],
        running: nn.Module | None = None,
        weights: WeightSource | None = None,
    ):
        self.model = model
        self.family = family
        self.layers = layers
        self.running = model if running is None else running
        self.weights = own_weights(layers) if weights is None else weights
        self.clock = SamplingClock(model, family)
        self.passes = 0
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.choice = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.grid: dict[float, Tensor] | None = None
        self.features = {name: FeatureObserver() for name in layers if family.is_temporal(name)}
        # Layers that read one tensor are watched once, through the first of them.
        by_input: dict[str, list[str]] = {}
        for name in layers:
            if name not in self.features:
                by_input.setdefault(family.input_group(name), []).append(name)
        self.groups = {names[0]: names for names in by_input.values()}
        self.inputs = {
            name: InputObserver(layers[name], self.generator, self.clock, family.frame_order_of(name))
            for name in self.groups
        }

    @classmethod
    def of(
        cls,
        model: nn.Module,
        spec: QuantSpec,
        running: nn.Module | None = None,
        weights: WeightSource | None = None,
    ) -> Observation:
        """An observation that has seen nothing yet. Of `spec` only the layers to leave out matter.

        Raises QVDError when `model` is no video denoiser, is quantized already, or has nothing to quantize.
        """
        refuse_quantized(model)
        refuse_altered(model)
        _refuse_training(model if running is None else running)
        family = family_or_generic(model)
        layers = quantizable_layers(model, family, spec)
        if not layers:
            raise QVDError(f"{type(model).__name__} has no layer that QVD can quantize: nothing was calibrated.")
        return cls(model, family, layers, running, weights)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Attach the hooks; always take them off again."""
        modules = dict(self.running.named_modules())
        handles = [
            self.running.register_forward_pre_hook(self.clock.read, with_kwargs=True),
            self.running.register_forward_pre_hook(self._remember_call, with_kwargs=True),
        ]
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

    def statistics(self, name: str, device: torch.device) -> InputStatistics | None:
        """Of the input that layer `name` (the first of its group) reads, on `device`; None: it never ran.

        Raises QVDError when the input held NaN or infinity.
        """
        observer = self.inputs[name]
        if observer.count == 0:
            return None
        for values in (observer.minimum, observer.maximum):
            check_observed(name, values)
        return InputStatistics.of(observer, device)

    def memory_bytes(self) -> int:
        """Bytes of all statistics and samples."""
        return sum(observer.memory_bytes() for observer in self.inputs.values())

    def _remember_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reservoir sampling: every pass has the same chance to stay."""
        self.passes += 1
        place = self.passes - 1
        if place >= CALLS_KEPT:
            place = self.choice.randrange(self.passes)
        if place < CALLS_KEPT:
            copied = _copied(args), _copied(kwargs)
            self.calls[place : place + 1] = [copied]

    def _observe_feature(self, observer: FeatureObserver, x: Tensor) -> None:
        if self.grid is None:  # during a pass: only then an offloaded embedding is where it can compute
            self.grid = grid_features(self.running, self.family)
        timestep = 0.0 if self.clock.timestep is None else float(self.clock.timestep)
        observer.observe(timestep, x)


@torch.no_grad()
def watch(observations: Sequence[Observation], run: Callable[[], object]) -> None:
    """Call `run` while every observation watches its model. Raises QVDError when one of them was never called."""
    with ExitStack() as hooks:
        for observation in observations:
            hooks.enter_context(observation.watching())
        run()
    for observation in observations:
        if observation.passes == 0:
            raise QVDError(
                f"the calibration run never called the model ({type(observation.running).__name__}): pass prompts or a "
                "callable that samples with it, over all the steps it will be used at."
            )


def _refuse_training(model: nn.Module) -> None:
    """Raise QVDError when a layer would disturb what is observed because it is in training mode."""
    disturbing = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    for name, module in model.named_modules():
        if module.training and isinstance(module, disturbing) and getattr(module, "p", 1.0) > 0:
            raise QVDError(
                f"{type(model).__name__} is in training mode, where {name} ({type(module).__name__}) changes what the "
                "layers see: switch the model to evaluation mode before calibrating it."
            )


def check_observed(name: str, values: Tensor) -> None:
    """Raise QVDError when something recorded of layer `name` holds NaN or infinity."""
    if not torch.isfinite(values).all():
        raise QVDError(
            f"the input of layer {name} held NaN or infinity during calibration: "
            "check that the model samples a sound video in this dtype (bfloat16 or float32) first."
        )


def _on_input(observe: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that hands on the layer's input, however it was passed (AnimateDiff says `input=`)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(args[0] if args else kwargs["input"])

    return hook


def _copied(value: Any) -> Any:
    """`value` with every tensor in it copied: samplers reuse their buffers."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
