"""What the benchmarks of whole blocks and models share: Wan models with random weights, and where their time goes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.kernel_results import write_json
from qvd_core import QuantSpec, quantize_model

SIZES: dict[str, dict[str, Any]] = {
    "1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "14b": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 2},  # tests
}
"""What differs between Wan's models."""

TEXT_TOKENS = 512
SEED = 0
FORMAT = 1

# The outermost operator of these names takes the time of what it calls.
_QUANTIZE = ("qvd::quantize_activation", "qvd::quantize_image")
_LINEAR = ("aten::linear", "qvd::int8_linear", "qvd::weight_only_linear")
_ATTENTION = ("aten::scaled_dot_product_attention",)
_WHOLE = "benchmark: one call"


def float_type(device: torch.device) -> torch.dtype:
    """Full precision on this device: float32 on a CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def make_wan(size: str, layers: int | None, device: torch.device) -> nn.Module:
    """A Wan transformer of one of `SIZES` with random weights, in the device's full precision."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(float_type(device))
    try:
        with torch.device(device):
            model: nn.Module = WanTransformer3DModel(**SIZES[size] | ({"num_layers": layers} if layers else {}))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def wan_inputs(model: nn.Module, frames: int, height: int, width: int) -> dict[str, Tensor]:
    """Arguments of a call: random latents of that size, 512 text tokens, one timestep; height and width even."""
    device, dtype = next((tensor.device, tensor.dtype) for tensor in model.parameters())
    generator = torch.Generator(device).manual_seed(SEED)
    sizes = {"hidden_states": (1, 16, frames, height, width), "encoder_hidden_states": (1, TEXT_TOKENS, 4096)}
    drawn = {key: torch.randn(size, generator=generator, device=device) for key, size in sizes.items()}
    return {key: x.to(dtype) for key, x in drawn.items()} | {"timestep": torch.tensor([500], device=device)}


def tokens_of(frames: int, height: int, width: int) -> int:
    """Tokens of latents of that size: Wan takes patches of 1 x 2 x 2."""
    return frames * (height // 2) * (width // 2)


def quantized(model: nn.Module, backend: str) -> nn.Module:
    """An int8 copy of a model, without calibration."""
    return quantize_model(copy.deepcopy(model), QuantSpec(backend=backend))  # type: ignore[arg-type]


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Shares:
    """Seconds of one profiled call. linear: linear layers, with the quantizing of their inputs, which is also apart."""

    whole: float
    linear: float
    quantize: float
    attention: float

    @property
    def rest(self) -> float:
        return max(0.0, self.whole - self.linear - self.attention)

    def to_dict(self) -> dict[str, float]:
        """Shares of the whole."""
        parts = {"linear": self.linear, "quantize": self.quantize, "attention": self.attention, "rest": self.rest}
        return {name: seconds / self.whole for name, seconds in parts.items()}


def profile_shares(function: Callable[[], object], device: torch.device) -> Shares:
    """Where the time of one call goes, after one call that is not looked at.

    On a CPU it is elapsed time, on a GPU the time its kernels run.
    """
    function()
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler, record_function(_WHOLE):
        function()
        if cuda:
            torch.cuda.synchronize(device)
    microseconds = dict.fromkeys((_WHOLE, *_QUANTIZE, *_LINEAR, *_ATTENTION), 0.0)
    for event in profiler.events() or ():
        inside = _outer_names(event)
        if event.name in microseconds and (event.name == _WHOLE or not inside & (microseconds.keys() - {_WHOLE})):
            microseconds[event.name] += event.device_time_total if cuda else event.cpu_time_total
    seconds = {name: value / 1e6 for name, value in microseconds.items()}
    quantize = sum(seconds[name] for name in _QUANTIZE)
    return Shares(
        whole=seconds[_WHOLE],
        linear=quantize + sum(seconds[name] for name in _LINEAR),
        quantize=quantize,
        attention=sum(seconds[name] for name in _ATTENTION),
    )


def _outer_names(event: Any) -> set[str]:
    names = set()
    while (event := event.cpu_parent) is not None:
        names.add(event.name)
    return names


class Cases:
    """Figures by case, in one JSON file that is written after every case; the next run finds what is done."""

    def __init__(self, path: Path, machine: dict[str, str]):
        self.path, self.machine = path, machine
        self.known: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
                if content["format"] != FORMAT:
                    raise ValueError(f"format {content['format']}, expected {FORMAT}")
                self.known = dict(content["cases"])
                self.machine = dict(content["machine"]) | machine
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is no file of this benchmark ({error}): move it away.") from error

    def put(self, case: str, figures: dict[str, Any]) -> None:
        self.known[case] = figures
        write_json(self.path, {"format": FORMAT, "machine": self.machine, "cases": self.known})
