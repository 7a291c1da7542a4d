"""What users do to a pipeline after loading it, one function per habit, and how to judge whether it still works.

A feature is applied to a quantized pipeline that has sampled already, which then samples again from the same noise.
The second result must be the first one (`SAME`: up to the rounding of sums, which may flip codes: within the error of
quantization itself), or, where a feature approximates on purpose, what the full-precision pipeline makes of it
(`APPROXIMATION`). A feature that fails counts as an upstream limit only when the full-precision pipeline fails alike.
"""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from qvd_core.layers import FLOAT32_BUFFERS, QuantizedLayer
from tests.diffusers.tiny_pipelines import PIPELINES, TinyPipeline

CPU = torch.device("cpu")


class Judge(enum.Enum):
    """What the result of a feature is compared with."""

    SAME = "the same pipeline before"
    STORAGE = "the same pipeline before, up to what the feature costs the full-precision one"
    APPROXIMATION = "the full-precision pipeline with the same feature"


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    apply: gets the kind of pipeline, the pipeline and an empty folder; sets the feature, and raises if it had no hold.
    undo: takes it back, where diffusers can; the first result must return.
    needs: the method a pipeline must have to offer this: "pipe.", "denoiser.", "vae." or "hooks." and its name.
    unchanged: whether every tensor of the quantized layers must be as before (not for what casts or moves to disk).
    steps, output_type, call: how it is sampled.
    """

    title: str
    apply: Callable[[TinyPipeline, Any, Path], Any]
    undo: Callable[[TinyPipeline, Any], Any] | None = None
    needs: tuple[str, ...] = ()
    judge: Judge = Judge.SAME
    unchanged: bool = True
    steps: int = 2
    output_type: str = "latent"
    call: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One cell: "ok", "not offered", "upstream" with diffusers' reason, or "wrong" with what was found."""

    verdict: str
    detail: str = ""


FEATURES: dict[str, Feature] = {}


def feature(title: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what applies the feature `title`."""

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        FEATURES[title] = Feature(title, apply, **settings)
        return apply

    return register


class Bench:
    """One pipeline in both versions, to try features on copies of it.

    full, quantized: its folders, the second with the result of `QVDConfig`.
    """

    def __init__(self, kind: str, full: Path, quantized: Path):
        self.kind = PIPELINES[kind]
        self._full = DiffusionPipeline.from_pretrained(full)
        self._quantized = DiffusionPipeline.from_pretrained(quantized)
        self._full_results: dict[str, Tensor] = {}

    def outcome(self, title: str, scratch: Path) -> Outcome:
        """Try one feature; scratch: an empty folder for it."""
        chosen = FEATURES[title]
        if not self.offers(chosen):
            return Outcome("not offered")
        try:
            before, after, undone = self._run(chosen, self._quantized, scratch / "quantized")
        except Exception as error:
            return self._upstream(chosen, scratch, error)
        exact_before = self._full_result(chosen)
        noise = distance(before, exact_before)  # what quantization itself costs
        if undone is not None and distance(undone, before) > noise:
            return Outcome("wrong", f"taking it back leaves a difference of {distance(undone, before):.1e}")
        difference, limit = distance(after, before), noise
        if chosen.judge is not Judge.SAME:
            _, exact_after, _ = self._run(chosen, self._full, scratch / "full")
        if chosen.judge is Judge.STORAGE:
            limit = noise + distance(exact_after, exact_before)
        if chosen.judge is Judge.APPROXIMATION:
            if distance(exact_after, exact_before) < 1e-6:
                return Outcome("upstream", "changes nothing in full precision either")
            difference, limit = distance(after, exact_after), 2 * noise
        if difference <= limit:
            return Outcome("ok")
        return Outcome("wrong", f"difference {difference:.1e}, allowed {limit:.1e}")

    def offers(self, chosen: Feature) -> bool:
        """Whether this diffusers has what the feature calls, for this pipeline."""
        owners = {
            "pipe": self._full,
            "denoiser": self.kind.model(self._full),
            "vae": self._full.vae,
            "hooks": diffusers.hooks,
        }
        return all(hasattr(owners[owner], name) for owner, name in (need.split(".") for need in chosen.needs))

    def _full_result(self, chosen: Feature) -> Tensor:
        """What the full-precision pipeline samples without the feature; the same for most of them."""
        key = str((chosen.output_type, chosen.steps, chosen.call))
        if key not in self._full_results:
            self._full_results[key] = self._sample(chosen, self._full)
        return self._full_results[key]

    def _sample(self, chosen: Feature, pipe: Any) -> Tensor:
        settings = {"output_type": chosen.output_type, "num_inference_steps": chosen.steps, **chosen.call}
        return self.kind.sample(pipe, **settings).float()

    def _upstream(self, chosen: Feature, scratch: Path, error: Exception) -> Outcome:
        """The verdict on a quantized pipeline's error: diffusers' own only if full precision fails alike."""
        try:
            self._run(chosen, self._full, scratch / "full")
        except Exception as other:
            if type(other) is type(error):
                return Outcome("upstream", one_line(other))
        return Outcome("wrong", one_line(error))

    def _run(self, chosen: Feature, pipe: Any, scratch: Path) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents (or frames) before the feature, with it, and after it was taken back (None where it cannot be)."""
        scratch.mkdir(parents=True)
        pipe = copy.deepcopy(pipe)
        before = self._sample(chosen, pipe)
        with intact(self.kind.model(pipe), chosen.unchanged):
            chosen.apply(self.kind, pipe, scratch)
            after = self._sample(chosen, pipe)
            undone = None
            if chosen.undo is not None:
                chosen.undo(self.kind, pipe)
                undone = self._sample(chosen, pipe)
        return before, after, undone


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected; infinite for NaN and other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    value = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    return value if value == value else float("inf")


@contextmanager
def intact(model: nn.Module, unchanged: bool) -> Iterator[None]:
    """Scales stay float32, and with `unchanged` every tensor of the quantized layers stays what it was, bit for bit."""
    before = quantized_tensors(model)
    yield
    after = quantized_tensors(model)
    for name, tensor in after.items():
        if name.rpartition(".")[2] in FLOAT32_BUFFERS and tensor.dtype != torch.float32:
            raise AssertionError(f"{name} became {tensor.dtype}")
    if unchanged:
        changed = [name for name, tensor in before.items() if name not in after or not torch.equal(tensor, after[name])]
        if changed or after.keys() != before.keys():
            raise AssertionError(f"changed: {changed}, new: {after.keys() - before.keys()}")


def quantized_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors of all quantized layers, by name; an adapter around a layer does not count."""
    return {
        f"{name.removesuffix('.base_layer')}.{key}": tensor.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        for key, tensor in layer.state_dict().items()
        if not tensor.is_meta
    }


def one_line(error: BaseException) -> str:
    """An error for a cell of a table: its type and the start of its first line, without paths and addresses."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"/\S*/|0x[0-9a-f]+", "...", lines[0])
    return f"{type(error).__name__}: {text[:110]}"


def hooked(model: nn.Module, *attributes: str) -> None:
    """Raise unless some module of `model` has one of the attributes that hooks leave."""
    if not any(hasattr(module, name) for module in model.modules() for name in attributes):
        raise AssertionError("no hook was set")
