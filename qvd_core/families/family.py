"""What QVD knows about one family of video denoisers. Only data: the algorithms never ask for a model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qvd_core.families.patterns import matches

FoldKind = Literal["norm", "value", "gate", "table", "modulation"]
FrameOrder = Literal["major", "minor"]


@dataclass(frozen=True)
class Sinusoid:
    """The embedding of a timestep in sines and cosines, where a model computes it in a function, not in a module.

    Timesteps [T] become [T, C]: of the angles factor * timestep * maximum_period ** (-i / half), half = C // 2, for i
    below half, first all cosines, then all sines, then a zero where C is odd. C is what the next linear reads.

    factor: what timesteps are multiplied by. maximum_period: of the slowest sinusoid, nearly, in steps times 2 pi.
    sine_first: the sines before the cosines.
    """

    factor: float = 1.0
    maximum_period: float = 10000.0
    sine_first: bool = False


@dataclass(frozen=True)
class Fold:
    """One place where SCRI's shift z and scale s move into what computes the input of some layers. METHOD section 3.

    kind:
        "norm": affine LayerNorm, GroupNorm or RMSNorm: gamma / s, (beta - z) / s.
        "value": value projections of plain softmax attention, whose weights sum to 1: W / s, (b - z) / s.
        "gate": the linear branch (first half of the rows) of a GEGLU or SwiGLU projection: W / s, b / s.
        "table": one row of a static modulation table that is added to shared features: row - z.
        "modulation": the linear that gives a norm its own shift and scale: the rows of the shift W / s, (b - z) / s,
            the rows of the scale, which acts as 1 + scale, W / s, (b + 1) / s - 1 [O].
    parent: pattern of the module below which the other names lie.
    producers: modules (the parameter, for "table") that together compute the input; all must be there.
    consumers: every layer that reads it. One left out makes the fold wrong; one that a model lacks does no harm.
    addends: producers of a second term of the input: they take the scale, but the shift must not be taken off twice.
    sections: for "table" and "modulation", (shift row, scale row), counted in blocks of the input's channels.
    scale: False where something that does not scale along is added after the producer (positional embeddings).
    leading: the producers give only the first channels of the input; the rest comes from elsewhere.
    """

    kind: FoldKind
    parent: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    addends: tuple[str, ...] = ()
    sections: tuple[tuple[int | None, int | None], ...] = ()
    scale: bool = True
    leading: bool = False


@dataclass(frozen=True)
class Family:
    """Where a family's temporal, sensitive and input-sharing layers are (patterns: see `patterns.py`).

    name: what people call it.
    classes: model class names it stands for.
    signature: modules that a model of the family has, where others have a class of the same name.
    image: it makes images (or sounds), no videos. Nothing but a note to the user follows from this.
    keep: layers that stay in full precision (embedders, the final projection).
    temporal: projections of the timestep embedding (M = batch): int8 weights, HTDQ features.
    temporal_features: modules to call one after the other on a timestep `[T]` to get the input of the temporal
        projections `[T, C]`, after a `Sinusoid` where that is no module; empty where the embedding also holds text, fps
        or guidance.
    timestep_range: the lowest and the highest timestep that a sampler hands to the model.
    other_conditions: modules that add such terms in some models of the family; where one exists, `find_family` gives
        the family without temporal_features.
    shared_inputs: (parent pattern, names below it): linears below one parent that read the same tensor.
    prompt_inputs: layers that read the text (or image) condition. Their ranges belong to the prompt, which no
        calibration can foresee, and they see few tokens: they keep dynamic scales when everything else is static.
    timestep_argument: name of the denoiser's forward argument that holds the timestep; empty where it has none.
    sample_argument: name of the one that holds the latents, batch first.
    frames_dim: which dimension of the latents counts the frames; None where the latents come as a flat sequence.
    frame_order: (layer pattern, order), first match counts: the frame of row m of the M flattened input rows of a
        layer (of a convolution: its pixels), for B latents of F frames. "major": (m // (M / (B * F))) % F;
        "minor": m % F. None, or no match: the layer mixes frames or text in, or was not looked at.
    folds: where shift and scale can move into the producer of a layer's input.
    minimum_features: layers with fewer inputs or outputs stay in full precision.
    """

    name: str
    classes: tuple[str, ...]
    keep: tuple[str, ...]
    temporal: tuple[str, ...] = ()
    temporal_features: tuple[str | Sinusoid, ...] = ()
    timestep_range: tuple[float, float] = (0.0, 1000.0)
    other_conditions: tuple[str, ...] = ()
    shared_inputs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    prompt_inputs: tuple[str, ...] = ()
    timestep_argument: str = "timestep"
    sample_argument: str = "hidden_states"
    frames_dim: int | None = None
    frame_order: tuple[tuple[str, FrameOrder | None], ...] = ()
    folds: tuple[Fold, ...] = ()
    minimum_features: int = 1
    signature: tuple[str, ...] = ()
    image: bool = False

    def keeps(self, layer: str) -> bool:
        return matches(layer, self.keep)

    def is_temporal(self, layer: str) -> bool:
        return matches(layer, self.temporal)

    def reads_prompt(self, layer: str) -> bool:
        return matches(layer, self.prompt_inputs)

    def input_group(self, layer: str) -> str:
        """A name shared by exactly the layers that read the same input as `layer`."""
        for pattern, children in self.shared_inputs:
            for child in children:
                parent = layer.removesuffix(f".{child}")
                if parent != layer and matches(parent, (pattern,)):
                    return f"{parent}.{'+'.join(children)}"
        return layer

    def frame_order_of(self, layer: str) -> FrameOrder | None:
        """How the rows of a layer's input run over the frames; None where that is unknown or frames mean nothing."""
        if self.frames_dim is None or self.reads_prompt(layer) or self.is_temporal(layer) or self.keeps(layer):
            return None
        return next((order for pattern, order in self.frame_order if matches(layer, (pattern,))), None)
