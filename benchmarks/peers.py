"""The peers: other int8 quantizers for video models, each applied through its own API to the very same layers.

Every peer is a function that quantizes the denoiser of a pipeline in place. It imports its package when it is called,
so that this module works without any of them: `apply_peer` answers with the reason where a peer cannot run.

A peer quantizes the layers that QVD quantizes, no more and no less, as far as it can; `Peer.note` says where it
cannot. None of them knows about temporal features: their projections are treated like any other linear layer.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from diffusers import DiffusionPipeline
from torch import nn

from qvd_core.families import family_or_generic
from qvd_core.plan import quantizable_layers
from qvd_core.spec import QuantSpec
from qvd_diffusers.sampling import find_denoiser

Run = Callable[[], object]
Apply = Callable[[DiffusionPipeline, Run], None]


class PeerUnavailable(RuntimeError):
    """A peer that cannot be measured here; the message is what the table says in place of numbers."""


@dataclass(frozen=True)
class Peer:
    """One way to quantize with another project.

    name: the row's name. package: its distribution, whose version the table shows.
    bits: what it really computes with, "W4A8" for 4-bit weights and 8-bit activations.
    granularity: of its activations, "token" or "static".
    apply: `(pipe, run)`: quantize the denoiser of `pipe` in place; `run()` samples with it, for calibration.
    convolutions: whether those compute in integers, too.
    finer_weights: whether weights have a scale per group of input channels, finer than one per output channel.
    note: what else differs from QVD's choice of layers and formats.
    """

    name: str
    package: str
    bits: str
    granularity: str
    apply: Apply
    convolutions: bool = True
    finer_weights: bool = False
    note: str = ""

    @property
    def version(self) -> str | None:
        """The installed version; None without the package."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def remark(self) -> str:
        """How it differs from QVD, for the footnotes of the table."""
        differences = {
            "convolutions stay in floating point": not self.convolutions and not self.note,
            "weight scales per group of input channels": self.finer_weights,
            self.note: bool(self.note),
        }
        return "; ".join([self.bits, *(text for text, holds in differences.items() if holds)])


def apply_peer(peer: Peer, pipe: DiffusionPipeline, run: Run) -> None:
    """Quantize the denoiser of `pipe` in place. Raises PeerUnavailable with a one-line reason where that fails."""
    if peer.version is None:
        raise PeerUnavailable("not installed")
    try:
        peer.apply(pipe, run)
    except Exception as error:
        raise PeerUnavailable(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _layers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """What QVD quantizes of the denoiser, by name: every peer is asked to take the same."""
    model = find_denoiser(pipe)
    return quantizable_layers(model, family_or_generic(model), QuantSpec())


def _linears(pipe: DiffusionPipeline) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in _layers(pipe).items() if isinstance(layer, nn.Linear)}


def _torchao_int8(pipe: DiffusionPipeline, run: Run) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    names = set(_linears(pipe))
    quantize_(find_denoiser(pipe), Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in names)


def _torchao_int4(pipe: DiffusionPipeline, run: Run) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    names = set(_linears(pipe))
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009  (PyTorch's stubs do not know it)
        weight_granularity=PerAxis(0),
    )
    quantize_(find_denoiser(pipe), config, filter_fn=lambda _, name: name in names)


def _quanto(weights: str) -> Apply:
    def apply(pipe: DiffusionPipeline, run: Run) -> None:
        from optimum.quanto import Calibration, freeze, qint4, qint8, quantize

        model = find_denoiser(pipe)
        # Its calibration hooks see positional arguments only, and AnimateDiff calls these two by keyword.
        by_keyword = ("motion_modules.*.proj_in", "motion_modules.*.proj_out")
        taken = [name for name in _layers(pipe) if not any(fnmatch(name, f"*{pattern}") for pattern in by_keyword)]
        quantize(model, weights={"int8": qint8, "int4": qint4}[weights], activations=qint8, include=taken)
        freeze(model)  # before the calibration, which would otherwise quantize every weight anew at every call
        with Calibration():
            run()

    return apply


def _sdnq(weights: str, hadamard: bool = False) -> Apply:
    def apply(pipe: DiffusionPipeline, run: Run) -> None:
        # Compiling one small graph per layer shape takes minutes on a CPU and fails for packed weights.
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
        from sdnq import sdnq_post_load_quant

        model = find_denoiser(pipe)
        taken = _layers(pipe)
        kept = [name for name, module in model.named_modules() if hasattr(module, "weight") and name not in taken]
        sdnq_post_load_quant(
            model,
            weights_dtype=weights,
            use_hadamard=hadamard,
            quant_conv=True,
            use_quantized_matmul=True,
            use_quantized_matmul_conv=weights == "int8",  # with packed weights its convolutions fail (0.2.8)
            add_skip_keys=False,
            minimum_allowed_numel=0,
            minimum_allowed_channel_size=0,
            modules_to_not_convert=[f"{name}.weight" for name in kept],
        )

    return apply


def _kitchen(layout: str, rotated: bool = True, **options: object) -> Apply:
    def apply(pipe: DiffusionPipeline, run: Run) -> None:
        from comfy_kitchen.tensor import QuantizedTensor

        for layer in _linears(pipe).values():
            rotation = {"convrot_groupsize": _rotation_size(layer.in_features)} if rotated else {}
            weight = QuantizedTensor.from_float(layer.weight.detach(), layout, **options, **rotation)
            layer.weight = nn.Parameter(weight, requires_grad=False)

    return apply


def _rotation_size(channels: int) -> int:
    """The largest size of comfy-kitchen's rotation (a power of 4, at most 256) that divides the channels."""
    return next(size for size in (256, 64, 16, 4, 1) if channels % size == 0)


_KEYWORD_NOTE = "AnimateDiff's motion modules keep their first and last layer in floating point"

_FLOAT_CONVOLUTIONS = "convolutions compute in floating point, with quantized weights"

PEERS: tuple[Peer, ...] = (
    Peer("torchao int8 dynamic", "torchao", "W8A8", "token", _torchao_int8, convolutions=False),
    Peer("torchao int4 weights", "torchao", "W4A8", "token", _torchao_int4, convolutions=False),
    Peer("optimum-quanto int8", "optimum-quanto", "W8A8", "static", _quanto("int8"), note=_KEYWORD_NOTE),
    Peer(
        "optimum-quanto int4 weights",
        "optimum-quanto",
        "W4A8",
        "static",
        _quanto("int4"),
        finer_weights=True,
        note=_KEYWORD_NOTE,
    ),
    Peer("SDNQ int8", "sdnq", "W8A8", "token", _sdnq("int8")),
    Peer("SDNQ int8 Hadamard", "sdnq", "W8A8", "token", _sdnq("int8", hadamard=True)),
    Peer("SDNQ int6", "sdnq", "W6A8", "token", _sdnq("int6"), convolutions=False, note=_FLOAT_CONVOLUTIONS),
    Peer(
        "SDNQ int4",
        "sdnq",
        "W4A8",
        "token",
        _sdnq("int4"),
        convolutions=False,
        finer_weights=True,
        note=_FLOAT_CONVOLUTIONS,
    ),
    Peer(
        "comfy-kitchen int8 row-wise",
        "comfy-kitchen",
        "W8A8",
        "token",
        _kitchen("TensorWiseINT8Layout", rotated=False, per_channel=True),
        convolutions=False,
    ),
    Peer(
        "comfy-kitchen int8 rotated",
        "comfy-kitchen",
        "W8A8",
        "token",
        _kitchen("TensorWiseINT8Layout", per_channel=True, convrot=True),
        convolutions=False,
    ),
    Peer(
        "comfy-kitchen int6 rotated",
        "comfy-kitchen",
        "W6A8",
        "token",
        _kitchen("AsymW4A8Int8Layout", bits=6, codebook=False),
        convolutions=False,
        finer_weights=True,
    ),
    Peer(
        "comfy-kitchen int4 rotated",
        "comfy-kitchen",
        "W4A8",
        "token",
        _kitchen("AsymW4A8Int8Layout"),
        convolutions=False,
        finer_weights=True,
    ),
)
