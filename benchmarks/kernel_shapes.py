"""The layers that are measured: of real video models, with the numbers of tokens that a CPU or a GPU sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """One linear layer or convolution with its input.

    model: whose it is. layer: which of its layers. batch: images or clips; for a linear layer its rows (tokens).
    inputs, outputs: channels. space: extents of the input, empty for a linear layer; kernel, stride and padding have as
    many entries (padding is the same on both sides).
    """

    model: str
    layer: str
    batch: int
    inputs: int
    outputs: int
    space: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    @property
    def kind(self) -> Literal["linear", "conv"]:
        return "conv" if self.space else "linear"

    @property
    def name(self) -> str:
        """Unique: "wan-1.3b qkv 1024x1536x1536" (rows, inputs, outputs), "svd res 320>320 3x3 8x40x64" (images)."""
        if self.kind == "linear":
            return f"{self.model} {self.layer} {self.batch}x{self.inputs}x{self.outputs}"
        kernel, space = ("x".join(map(str, sizes)) for sizes in (self.kernel, (self.batch, *self.space)))
        hop = "" if set(self.stride) == {1} else f"/{max(self.stride)}"
        return f"{self.model} {self.layer} {self.inputs}>{self.outputs} {kernel}{hop} {space}"

    @property
    def dilation(self) -> tuple[int, ...]:
        return (1,) * len(self.space)

    @property
    def padded_space(self) -> tuple[int, ...]:
        return tuple(extent + 2 * margin for extent, margin in zip(self.space, self.padding, strict=True))

    @property
    def out_space(self) -> tuple[int, ...]:
        sizes = zip(self.padded_space, self.kernel, self.stride, strict=True)
        return tuple((extent - taps) // hop + 1 for extent, taps, hop in sizes)

    @property
    def terms(self) -> int:
        """Products per output: K, or channels times taps."""
        return self.inputs * prod(self.kernel)

    @property
    def rows(self) -> int:
        """Tokens, or pixels of the output."""
        return self.batch * prod(self.out_space)

    @property
    def low_high_padding(self) -> list[int]:
        """As `torch.nn.functional.pad` takes it: the last dimension first."""
        return [margin for margin in reversed(self.padding) for _ in range(2)]


# Inputs and outputs of the layers of one transformer block.
_BLOCKS: dict[str, dict[str, tuple[int, int]]] = {
    "wan-1.3b": {"qkv": (1536, 1536), "up": (1536, 8960), "down": (8960, 1536)},
    "wan-14b": {"qkv": (5120, 5120), "up": (5120, 13824), "down": (13824, 5120)},
    "hunyuan": {"qkv": (3072, 3072), "up": (3072, 12288), "single-out": (15360, 3072)},
    "ltx": {"qkv": (2048, 2048), "up": (2048, 8192), "down": (8192, 2048)},
}
_CPU_ROWS: dict[str, dict[str, tuple[int, ...]]] = {
    "wan-1.3b": {"qkv": (256, 512, 1024, 4096, 8192), "up": (1024, 4096), "down": (1024, 4096)},
    "wan-14b": {"qkv": (256, 1024), "up": (512,), "down": (512,)},
    "hunyuan": {"qkv": (1024,), "up": (512,), "single-out": (512,)},
    "ltx": {"qkv": (1024, 4096), "up": (1024,), "down": (1024,)},
}
# Up to 16 rows: modulation, of few prompts. 512: text tokens. Wan: 81 frames of 832x480 and of 1280x720. HunyuanVideo:
# 129 frames of 960x544 and of 1280x720. LTX: 121 frames of 704x480, 161 of 1216x704.
_GPU_ROWS = {
    "wan-1.3b": (512, 32760),
    "wan-14b": (1, 16, 512, 32760, 75600),
    "hunyuan": (67320, 118800),
    "ltx": (5280, 17556),
}


def _square(size: int, dimensions: int = 2) -> dict[str, tuple[int, ...]]:
    return {"kernel": (size,) * dimensions, "stride": (1,) * dimensions, "padding": (size // 2,) * dimensions}


_DOWN = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
_TEMPORAL = {"kernel": (3, 1, 1), "stride": (1, 1, 1), "padding": (1, 0, 0)}

_CPU_CONVOLUTIONS = (
    Shape("svd", "res", 4, 320, 320, (40, 64), **_square(3)),
    Shape("svd", "res", 4, 1280, 1280, (10, 16), **_square(3)),
    Shape("svd", "up-res", 4, 2560, 1280, (10, 16), **_square(3)),
    Shape("svd", "down", 4, 640, 640, (20, 32), **_DOWN),
    Shape("svd", "shortcut", 4, 320, 640, (20, 32), **_square(1)),
    Shape("svd", "temporal", 1, 320, 320, (8, 40, 64), **_TEMPORAL),
    Shape("svd", "temporal", 1, 1280, 1280, (8, 10, 16), **_TEMPORAL),
    Shape("animatediff", "res", 8, 320, 320, (32, 32), **_square(3)),
    Shape("animatediff", "down", 8, 320, 320, (32, 32), **_DOWN),
    Shape("animatediff", "proj", 8, 640, 640, (16, 16), **_square(1)),
    Shape("vae", "res", 1, 96, 96, (5, 48, 48), **_square(3, 3)),
    Shape("vae", "res", 1, 384, 384, (3, 24, 24), **_square(3, 3)),
)
# SVD: 25 frames of 1024x576. AnimateDiff: two branches of guidance, 16 frames of 512x512.
_GPU_CONVOLUTIONS = (
    Shape("svd", "res", 25, 320, 320, (72, 128), **_square(3)),
    Shape("svd", "res", 25, 1280, 1280, (18, 32), **_square(3)),
    Shape("svd", "up-res", 25, 2560, 1280, (18, 32), **_square(3)),
    Shape("svd", "down", 25, 320, 320, (72, 128), **_DOWN),
    Shape("svd", "shortcut", 25, 320, 640, (36, 64), **_square(1)),
    Shape("svd", "temporal", 1, 320, 320, (25, 72, 128), **_TEMPORAL),
    Shape("svd", "temporal", 1, 1280, 1280, (25, 18, 32), **_TEMPORAL),
    Shape("animatediff", "res", 32, 320, 320, (64, 64), **_square(3)),
    Shape("animatediff", "down", 32, 320, 320, (64, 64), **_DOWN),
    Shape("animatediff", "proj", 32, 640, 640, (32, 32), **_square(1)),
    Shape("vae", "res", 1, 96, 96, (21, 240, 416), **_square(3, 3)),
    Shape("vae", "res", 1, 384, 384, (21, 60, 104), **_square(3, 3)),
)


def shapes_for(device: str) -> list[Shape]:
    """All shapes for "cpu" or "cuda", linear layers first."""
    cpu = device == "cpu"
    linears = [
        Shape(model, layer, rows, inputs, outputs)
        for model, layers in _BLOCKS.items()
        for layer, (inputs, outputs) in layers.items()
        for rows in (_CPU_ROWS[model][layer] if cpu else _GPU_ROWS[model])
    ]
    return [*linears, *(_CPU_CONVOLUTIONS if cpu else _GPU_CONVOLUTIONS)]


def choose(shapes: Sequence[Shape], patterns: Sequence[str]) -> list[Shape]:
    """Those whose name, model or kind ("linear", "conv") matches one of the patterns (with *)."""
    return [
        shape
        for shape in shapes
        if any(fnmatch(text, pattern) for pattern in patterns for text in (shape.name, shape.model, shape.kind))
    ]
