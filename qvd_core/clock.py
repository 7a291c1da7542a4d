"""The sampling clock: what a denoiser is being asked for right now, for the layers whose scales depend on it.

Static scales may differ per range of timesteps or per video frame. Neither is visible inside a layer, so one hook on
the model notes them at the start of every forward pass.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvd_core.families import Family

logger = logging.getLogger(__name__)


class SamplingClock:
    """The timestep and the latent shape of the forward pass that is under way.

    timestep: 0-d float32 tensor, on the device the model got it on (reading it would stall a GPU); None before the
        first pass. Where every token has a timestep of its own (image to video), it is the noisiest one.
    batch, frames: of the latents; 0 where the family does not say where they are.
    """

    def __init__(self, model: nn.Module, family: Family):
        self.timestep: Tensor | None = None
        self.batch = 0
        self.frames = 0
        self.handle: RemovableHandle | None = None  # of the hook that winds this clock
        self.scattered: str | None = None  # why rows do not tell their frame in this pass, see `scattered_rows`
        self._timestep_argument = family.timestep_argument
        self._sample_argument = family.sample_argument
        self._frames_dim = family.frames_dim
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._said: set[str] = set()

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook (`with_kwargs=True`) that sets the clock."""
        timestep = self._argument(self._timestep_argument, args, kwargs)
        if timestep is not None:
            several = timestep if isinstance(timestep, tuple | list) else (timestep,)  # of video and sound
            self.timestep = torch.stack([torch.as_tensor(one).float().amax() for one in several]).amax()
        sample = self._argument(self._sample_argument, args, kwargs)
        if isinstance(sample, Tensor) and self._frames_dim is not None and sample.dim() > self._frames_dim:
            self.batch, self.frames = sample.shape[0], sample.shape[self._frames_dim]
            if not torch.compiler.is_compiling():  # a traced program cannot change its structure anyway
                self.scattered = scattered_rows(module)

    def detach(self) -> None:
        """Take the hook off the model."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = self._parameters.index(name) if name in self._parameters else len(args)
        return args[index] if index < len(args) else None

    def frame_of_rows(self, rows: int, order: str, device: torch.device | str = "cpu") -> Tensor | None:
        """int64 [rows] on `device`: the frame of each row of a flattened input; None where rows are not whole frames.

        order: "major" where the rows of one frame follow each other, "minor" where the frame runs fastest.
        """
        if self.frames == 0 or rows == 0 or rows % (self.batch * self.frames):
            return None
        if order == "minor":
            return torch.arange(rows, device=device) % self.frames
        return torch.arange(rows, device=device) // (rows // (self.batch * self.frames)) % self.frames

    def bucket_step(self, steps: Tensor, boundaries: Tensor) -> Tensor:
        """The step [1] of the current timestep out of steps [G] (timesteps ascending) between boundaries [G-1]."""
        if self.timestep is None:
            return self._widest(steps, "no timestep is known")
        bucket = torch.bucketize(self.timestep.to(boundaries.device), boundaries)
        return steps.index_select(0, bucket.view(1))  # steps[bucket] would read the bucket on the host

    def frame_step(self, steps: Tensor, rows: int, order: str) -> Tensor:
        """One step per row [rows, 1] out of one per frame [F]; the widest [1] where the frames are other than F."""
        if self.scattered is not None:
            return self._widest(steps, self.scattered)
        frame = self.frame_of_rows(rows, order, steps.device) if self.frames == len(steps) else None
        if frame is None:
            return self._widest(steps, f"{self.frames} latent frames are sampled, {len(steps)} were calibrated")
        return steps[frame].unsqueeze(1)

    def _widest(self, steps: Tensor, why: str) -> Tensor:
        """The step that clips least, and one line that says why."""
        if why not in self._said:
            self._said.add(why)
            logger.warning("Layers use their widest calibrated scale: %s.", why)
        return steps.amax().view(1)


_PIECEWISE = ("FreeNoiseTransformerBlock", "SplitInferenceModule")
"""Modules of diffusers that hand layers some frames or some images of a clip at a time."""


def scattered_rows(model: nn.Module) -> str | None:
    """Why a layer's rows may be others than the latents `model` was called with make one expect; None if they are not.

    diffusers can split a layer's input over processes, guidance branches, windows of frames or chunks. A layer then
    cannot tell which frame a row belongs to, and counting the rows would often give a wrong answer instead of none.
    """
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        return "the tokens are split over processes (context parallelism)"
    hooks = getattr(getattr(model, "_diffusers_hook", None), "hooks", {})
    if not getattr(hooks.get("faster_cache_denoiser"), "is_guidance_distilled", True):
        return "FasterCache leaves out a guidance branch"
    for module in model.modules():
        if type(module).__name__ in _PIECEWISE or getattr(module, "_chunk_size", None) is not None:
            return f"{type(module).__name__} splits its input"
    return None
