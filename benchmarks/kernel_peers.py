"""Other projects' int8 layers, each made by its own API from one plain layer. None of them is a dependency.

They take an input and give an output, not codes, so their arithmetic is judged by the error of the output alone.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.kernel_problem import Problem
from benchmarks.kernel_rows import Prepared, Row, RowUnavailable

_QUANTIZED_SHARE = 0.75  # of the float bytes: an int8 weight has a quarter or a half, what is above is not quantized

Quantize = Callable[[nn.Sequential, Tensor], nn.Module]


def _peer(problem: Problem, quantize: Quantize, package: str, linear_only: bool = False) -> Prepared:
    """The problem's layer, quantized by `quantize(model, input)`, which returns the model to run."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise RowUnavailable(f"{package} is not installed") from None
    if linear_only and problem.shape.kind == "conv":
        raise RowUnavailable("linear layers only")
    from benchmarks.measure import denoiser_bytes  # here: it needs diffusers, which no other row does

    model = nn.Sequential(_plain_layer(problem)).eval().requires_grad_(False)
    before = denoiser_bytes(model)
    model_to_run = quantize(model, problem.input)
    after = denoiser_bytes(model)
    if after > _QUANTIZED_SHARE * before:
        raise RowUnavailable(f"it leaves {type(_plain_layer(problem)).__name__} layers of this size in floating point")

    def run() -> Tensor:
        return model_to_run(problem.input)

    return Prepared(run, after - _bytes(problem.bias.to(problem.dtype)))


def _plain_layer(problem: Problem) -> nn.Linear | nn.Conv2d | nn.Conv3d:
    shape = problem.shape
    with torch.device("meta"):
        if shape.kind == "linear":
            layer: nn.Linear | nn.Conv2d | nn.Conv3d = nn.Linear(shape.inputs, shape.outputs)
        else:
            convolution = nn.Conv2d if len(shape.space) == 2 else nn.Conv3d
            layer = convolution(
                shape.inputs,
                shape.outputs,
                shape.kernel,  # type: ignore[arg-type]
                shape.stride,  # type: ignore[arg-type]
                shape.padding,  # type: ignore[arg-type]
            )
    layer.weight = nn.Parameter(problem.weight.to(problem.dtype))
    layer.bias = nn.Parameter(problem.bias.to(problem.dtype))
    return layer


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _torchao(model: nn.Sequential, x: Tensor, compiled: bool = False) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    # Frozen, as its documentation has it for CPUs: only then is the weight packed for oneDNN.
    if not compiled:
        return model
    frozen = {"freezing": True} if x.device.type == "cpu" else {}
    return torch.compile(model, dynamic=False, options=dict(frozen))  # type: ignore[return-value]


def _quanto(model: nn.Sequential, x: Tensor) -> nn.Module:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    freeze(model)
    with Calibration():
        model(x)
    return model


def _sdnq(model: nn.Sequential, x: Tensor) -> nn.Module:
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "1" if x.device.type == "cuda" else "0")
    from sdnq import sdnq_post_load_quant

    sdnq_post_load_quant(
        model,
        weights_dtype="int8",
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        add_skip_keys=False,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
    )
    return model


def _kitchen(model: nn.Sequential, x: Tensor) -> nn.Module:
    from comfy_kitchen.tensor import QuantizedTensor

    layer = model[0]
    assert isinstance(layer, nn.Linear)
    weight = QuantizedTensor.from_float(layer.weight.detach(), "TensorWiseINT8Layout", per_channel=True)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _row(name: str, quantize: Quantize, package: str, linear_only: bool = False) -> Row:
    prepare = partial(_peer, quantize=quantize, package=package, linear_only=linear_only)
    return Row(name, "peer", prepare, package=package)


PEER_ROWS: tuple[Row, ...] = (
    _row("torchao int8 dynamic", _torchao, "torchao", linear_only=True),
    _row("torchao int8 dynamic, compiled", partial(_torchao, compiled=True), "torchao", linear_only=True),
    _row("optimum-quanto int8", _quanto, "optimum-quanto"),
    _row("SDNQ int8", _sdnq, "sdnq"),
    _row("comfy-kitchen int8 row-wise", _kitchen, "comfy-kitchen", linear_only=True),
)
