"""What QVD knows about one family of video denoisers. Only data: the algorithms never ask for a model's name."""

from __future__ import annotations

from dataclasses import dataclass

from qvd_core.families.patterns import matches


@dataclass(frozen=True)
class Family:
    """Where a family's temporal, sensitive and input-sharing layers are (patterns: see `patterns.py`).

    name: what people call it.
    classes: model class names it stands for.
    keep: layers that stay in full precision (embedders, the final projection).
    temporal: projections of the timestep embedding (M = batch): int8 weights, HTDQ features.
    temporal_features: modules to call one after the other on a timestep `[T]` to get the input of the temporal
        projections `[T, C]`; empty where the embedding also holds text, fps or guidance.
    shared_inputs: (parent pattern, child names): linears below one parent that read the same tensor.
    prompt_inputs: layers that read the text (or image) condition. Their ranges belong to the prompt, which no
        calibration can foresee, and they see few tokens: they keep dynamic scales when everything else is static.
    timestep_argument: name of the denoiser's forward argument that holds the timestep.
    """

    name: str
    classes: tuple[str, ...]
    keep: tuple[str, ...]
    temporal: tuple[str, ...] = ()
    temporal_features: tuple[str, ...] = ()
    shared_inputs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    prompt_inputs: tuple[str, ...] = ()
    timestep_argument: str = "timestep"
    minimum_features: int = 1

    def keeps(self, layer: str) -> bool:
        return matches(layer, self.keep)

    def is_temporal(self, layer: str) -> bool:
        return matches(layer, self.temporal)

    def reads_prompt(self, layer: str) -> bool:
        return matches(layer, self.prompt_inputs)

    def input_group(self, layer: str) -> str:
        """A name shared by exactly the layers that read the same input as `layer`."""
        parent, _, child = layer.rpartition(".")
        for pattern, children in self.shared_inputs:
            if child in children and matches(parent, (pattern,)):
                return f"{parent}.{'+'.join(children)}"
        return layer
