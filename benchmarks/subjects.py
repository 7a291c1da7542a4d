"""The models that are measured: a miniature, plain or stressed, its full-precision clips, and what calibration saw."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.peers import apply_peer
from benchmarks.rows import Row
from examples.moving_digits import sampling
from qvd_core import quantize_model
from qvd_core.calibrate import observe_model, search_scales
from qvd_core.fingerprint import content_fingerprint
from qvd_core.observation import Observation
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_diffusers.config import DENOISERS
from qvd_diffusers.sampling import find_denoiser

STRESSED = "-stressed"
MODELS = tuple(f"{name}{suffix}" for suffix in ("", STRESSED) for name in sampling.MINIATURES)
CACHE = Path("out/benchmarks")
STRESS_SEED = 0
CALIBRATION_BATCH = 4  # small: a few rows are sampled of every call, and many calls sample more of them
BATCH = 16  # larger ones are slower on a CPU: they fall out of its cache


class Subject:
    """One model: samples with any quantization of it, always from the same prompts and noise."""

    def __init__(self, name: str, clips: int, cache: Path = CACHE):
        """name: one of `MODELS`. clips: how many to sample. cache: folder of full-precision clips."""
        self.name, self.clips, self.cache = name, clips, cache
        folder = sampling.miniature(name.removesuffix(STRESSED))
        self.call = sampling.load_call(folder)
        self.pipe: DiffusionPipeline = sampling.load_pipeline(folder)
        self.model = find_denoiser(self.pipe)
        self.component = next(part for part in DENOISERS if getattr(self.pipe, part, None) is self.model)
        if name.endswith(STRESSED):
            from examples.moving_digits.stress import stress

            stress(self.model, seed=STRESS_SEED)
        self.model.eval().requires_grad_(False)
        self.captions = sampling.held_out_prompts(clips)
        self._observation: Observation | None = None
        self._searched: dict[QuantSpec, Scales] = {}

    def full_precision(self, other_noise: bool = False) -> Tensor:
        """Clips [N, 3, T, H, W] in [0, 1] of the full-precision model; sampled once, then read from the cache."""
        first = sampling.HELD_OUT_SEED + (self.clips if other_noise else 0)
        fingerprint = content_fingerprint(self.model)[:12]
        path = self.cache / f"{self.name}-{fingerprint}-{first}-{self.clips}.safetensors"
        if path.exists():
            return load_file(path)["clips"]
        clips = self._sample(first)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        save_file({"clips": clips.contiguous()}, unfinished)
        unfinished.rename(path)
        return clips

    def quantized(self, row: Row, bits: str) -> tuple[nn.Module, Scales | None]:
        """The denoiser quantized as `row` says, and its scales. Raises PeerUnavailable where a peer cannot run."""
        model = copy.deepcopy(self.model)
        if row.peer is not None:
            with self._lent(model):
                apply_peer(row.peer, self.pipe, partial(self.sample_for_calibration, batch=BATCH))
            return model, None
        spec = row.spec(bits)
        if not row.calibrated:
            return quantize_model(model, spec), None
        scales = self._search(spec)
        if row.edit is not None:
            scales = row.edit(scales, self.model)
            spec = replace(scales.spec, rounding=spec.rounding)
        return quantize_model(model, spec, scales), scales

    def _search(self, spec: QuantSpec) -> Scales:
        """Scales for `spec`; rows that differ in the rounding alone share one search, which does not depend on it."""
        spec = replace(spec, rounding="gptq")
        if spec not in self._searched:
            self._searched[spec] = search_scales(self.observation(), spec)
        return self._searched[spec]

    def sample(self, model: nn.Module) -> Tensor:
        """Clips [N, 3, T, H, W] in [0, 1] with `model` as the denoiser, from the reference's prompts and noise."""
        with self._lent(model):
            return self._sample(sampling.HELD_OUT_SEED)

    def sample_for_calibration(self, batch: int = CALIBRATION_BATCH) -> None:
        """Calibration prompts, from noise that no judged clip starts from.

        Peers get them in one batch, which is to their advantage: optimum-quanto averages over calls and forgets.
        """
        prompts = sampling.calibration_prompts()
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            seeds = range(sampling.CALIBRATION_SEED + start, sampling.CALIBRATION_SEED + start + len(part))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            self.pipe(prompt=part, generator=generators, output_type="latent", **self.call)

    def observation(self) -> Observation:
        """What calibration saw of the full-precision model; one pass serves the search for every spec."""
        if self._observation is None:
            self._observation = observe_model(self.model, self.sample_for_calibration)
        return self._observation

    def _sample(self, first_seed: int) -> Tensor:
        seeds = sampling.held_out_seeds(self.clips, first_seed)
        return sampling.sample_video(self.pipe, self.captions, seeds, self.call, BATCH, self.name)

    @contextmanager
    def _lent(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` is the pipeline's denoiser."""
        setattr(self.pipe, self.component, model)
        try:
            yield
        finally:
            setattr(self.pipe, self.component, self.model)
