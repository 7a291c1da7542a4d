"""What users do to a pipeline after loading it, one function per habit, and how to judge whether it still works.

A feature is applied to a quantized pipeline that has sampled already, which then samples again from the same noise.
The second result must be the first one (`SAME`: up to the rounding of sums, which may flip codes), or, where a feature
approximates on purpose, what the full-precision pipeline makes of it (`APPROXIMATION`). A feature that fails counts as
an upstream limit only when the full-precision pipeline fails in the same way.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from qvd_core.layers import FLOAT32_BUFFERS, QuantizedLayer
from qvd_diffusers import QVDError
from tests.diffusers.tiny_pipelines import PIPELINES, TinyPipeline

CPU = torch.device("cpu")


class Judge(enum.Enum):
    """What the result of a feature is compared with."""

    SAME = "the same pipeline before"
    APPROXIMATION = "the full-precision pipeline with the same feature"


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    apply: gets the kind of pipeline, the pipeline and an empty folder; sets the feature, and raises if it had no hold.
    undo: takes it back, where diffusers can; the first result must return.
    unchanged: whether every tensor of the quantized layers must be as before (not for what casts or moves to disk).
    steps: of the sampler.
    """

    title: str
    apply: Callable[[TinyPipeline, Any, Path], Any]
    undo: Callable[[TinyPipeline, Any], Any] | None = None
    judge: Judge = Judge.SAME
    unchanged: bool = True
    steps: int = 3
    output_type: str = "latent"
    call: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One cell: "ok", "upstream" with diffusers' reason, "refused" with ours, or "wrong" with what was found."""

    verdict: str
    detail: str = ""


FEATURES: dict[str, Feature] = {}


def feature(title: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what applies the feature `title`."""

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        FEATURES[title] = Feature(title, apply, **settings)
        return apply

    return register


def outcome(title: str, kind: str, full: Path, quantized: Path, scratch: Path) -> Outcome:
    """Try one feature on one pipeline. full, quantized: folders of the pipeline, to be loaded here."""
    try:
        before, after, undone = run(title, kind, quantized, scratch / "quantized")
    except QVDError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        reason = one_line(error)
        try:
            run(title, kind, full, scratch / "full")
        except type(error) as same:
            return Outcome("upstream", one_line(same))
        except Exception as other:
            return Outcome("wrong", f"{reason}; in full precision {one_line(other)}")
        return Outcome("wrong", reason)
    return judged(FEATURES[title], title, kind, full, scratch, (before, after, undone))


def judged(
    chosen: Feature, title: str, kind: str, full: Path, scratch: Path, found: tuple[Tensor, Tensor, Tensor | None]
) -> Outcome:
    """Compare what a quantized pipeline sampled before, with and after a feature with what it should have."""
    before, after, undone = found
    exact_before, exact_after, _ = run(title, kind, full, scratch / "full")
    noise = distance(before, exact_before)  # what quantization itself costs
    if undone is not None and distance(undone, before) > noise:
        return Outcome("wrong", f"taking it back leaves a difference of {distance(undone, before):.1e}")
    if chosen.judge is Judge.SAME:
        error, limit = distance(after, before), noise
    else:
        error, limit = distance(after, exact_after), 2 * noise
        if distance(after, before) == 0:
            return Outcome("wrong", "it changed nothing")
    return Outcome("ok") if error <= limit else Outcome("wrong", f"difference {error:.1e}, allowed {limit:.1e}")


def run(title: str, kind: str, folder: Path, scratch: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents (or frames) before the feature, with it, and after it was taken back (None where it cannot be)."""
    chosen, tiny = FEATURES[title], PIPELINES[kind]
    scratch.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(folder)

    def sample() -> Tensor:
        frames = tiny.sample(pipe, output_type=chosen.output_type, num_inference_steps=chosen.steps, **chosen.call)
        return frames.float()

    before = sample()
    with intact(tiny.model(pipe), chosen.unchanged):
        chosen.apply(tiny, pipe, scratch)
        after = sample()
        undone = None
        if chosen.undo is not None:
            chosen.undo(tiny, pipe)
            undone = sample()
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
    """Copies of the tensors of all quantized layers, by name."""
    return {
        f"{name}.{key}": tensor.clone()
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
