"""Every Triton kernel compiled ahead of time, without a GPU, for the GPUs it may meet.

What is compiled are the launches of the backend itself, of tensors on the meta device, with the tiles of the table.
Asserted are the instructions that make the kernels fast, no registers spilled, and the shared memory of the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvd_core.ops.fronts import FRONTS, Front
from qvd_core.ops.triton import conv, gemm, quantize
from qvd_core.ops.triton.launch import Launch
from qvd_core.ops.triton.tiles import KINDS, SHARED_MEMORY, Tile, architecture, find_tile, tiles

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

CAPABILITIES = (80, 89, 90, 120)
NEWEST = [90, 120]  # one GPU with wgmma, one without
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Compiled:
    """What can be said of a kernel without running it."""

    ptx: str
    spilled: int  # bytes of stack and local memory per thread
    shared: int  # bytes of shared memory per program

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


@pytest.fixture(autouse=True, scope="module")
def _own_kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_launch(launch: Launch, capability: int, folder: Path) -> Compiled:
    """Compile as the launch would be on a GPU of `capability`: with the same types, constants and alignments."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, alignments = specialize(launch)
    kernel = triton.compile(
        ASTSource(launch.kernel, signature, constants, alignments),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    sizes = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    assert set(sizes) == {"REG", "STACK", "LOCAL"}, usage.stdout + usage.stderr
    return Compiled(kernel.asm["ptx"], int(sizes["STACK"]) + int(sizes["LOCAL"]), kernel.metadata.shared)


def specialize(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Triton's own rules: None and 1 become constants, and multiples of 16 are known to be that."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    alignments: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            alignments[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, alignments


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int8_product(capability: int, tile: Tile) -> str:
    """The tensor-core instruction of an int8 product: wgmma needs 64 rows."""
    if capability == 90 and tile.block_m >= 64:
        return r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
    return r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32"


def product(kind: str, capability: int, m: int, n: int, k: int, full: bool) -> tuple[Launch, Tile]:
    """The launch of an [m, k] x [k, n] product; `full`: with gate and residual. A convolution's k are channels."""
    tile = find_tile(kind, capability, m, n, k)
    scale, bias, out = meta(n, 1), meta(n, dtype=torch.bfloat16), torch.bfloat16
    weight = meta(n, k, dtype=torch.int8)
    if kind == "conv":
        codes, weight = meta(16, 66, 66, k, dtype=torch.int8), meta(n, k, 3, 3, dtype=torch.int8)
        return conv.plan_conv(codes, meta(1), weight, scale, bias, [3, 3], [1, 1], [1, 1], out, tile)[1], tile
    if kind == "weight_only":
        x = meta(m, k, dtype=torch.bfloat16)
        return gemm.plan_weight_only(x, weight, scale, bias, out, tile)[1], tile
    if kind == "linear_packed":
        weight = meta(n, -(-k // 2), dtype=torch.uint8)
    codes = meta(m, k, dtype=torch.int8)
    residual, gate = (meta(m, n, dtype=out), meta(1, n, dtype=out)) if full else (None, None)
    return gemm.plan_linear(codes, meta(m, 1), weight, scale, bias, residual, gate, out, tile)[1], tile


def assert_product(kind: str, capability: int, m: int, n: int, k: int, full: bool, folder: Path) -> None:
    launch, tile = product(kind, capability, m, n, k, full)
    compiled = compile_launch(launch, capability, folder)
    tensor_cores = (
        r"(wgmma|mma\.sync)\S*bf16|tcgen05\.mma\S*kind::f16"
        if kind == "weight_only"
        else int8_product(capability, tile)
    )
    assert compiled.count(tensor_cores) > 0
    assert compiled.count(r"cp\.async") > 0  # copies that run beside the products
    assert compiled.spilled == 0
    assert compiled.shared <= SHARED_MEMORY[architecture(capability)]


class TestProducts:
    """The shapes that matter most: large and small, of a transformer and of a UNet."""

    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize(
        ("kind", "m", "n", "k", "full"),
        [
            ("linear", 32760, 5120, 13824, True),
            ("linear", 32760, 1536, 1536, False),
            ("linear_packed", 512, 5120, 5120, False),
            ("weight_only", 2, 30720, 5120, False),
            ("conv", 65536, 320, 320, False),
        ],
    )
    def test_a_large_shape(
        self, kind: str, m: int, n: int, k: int, full: bool, capability: int, tmp_path: Path
    ) -> None:
        assert_product(kind, capability, m, n, k, full, tmp_path)

    @pytest.mark.parametrize("capability", NEWEST)
    @pytest.mark.parametrize(
        ("kind", "m", "n", "k"), [("linear", 16, 1536, 1536), ("linear", 200, 5120, 5120), ("conv", 65536, 4, 320)]
    )
    def test_a_small_shape(self, kind: str, m: int, n: int, k: int, capability: int, tmp_path: Path) -> None:
        assert_product(kind, capability, m, n, k, False, tmp_path)

    @pytest.mark.parametrize("kind", ["linear", "weight_only"])
    def test_rows_of_any_length_are_read_in_vectors(self, kind: str, tmp_path: Path) -> None:
        assert_product(kind, 90, 64, 511, 333, False, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("capability", [*CAPABILITIES, 100])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_tile_of_the_table(self, kind: str, capability: int, tmp_path: Path) -> None:
        largest = (65536, 320, 320) if kind == "conv" else (32760, 5120, 5120)
        for rule in tiles()[architecture(capability)][kind]:
            m, n, k = (most or size for most, size in zip((rule.max_m, rule.max_n, rule.max_k), largest, strict=True))
            if find_tile(kind, capability, m, n, k) != rule:
                continue  # hidden by an earlier rule at this corner
            for terms, full in ((k, False), (k, True), (max(k - 48, 16), False)):
                assert_product(kind, capability, m, n, terms, full, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_weight_only_of_other_dtypes(self, dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
        for m, n, k in ((1, 1536, 1536), (2, 30720, 5120), (64, 5120, 5120)):
            tile = find_tile("weight_only", capability, m, n, k)
            arguments = (meta(n, k, dtype=torch.int8), meta(n, 1), None, dtype, tile)
            launch = gemm.plan_weight_only(meta(m, k, dtype=dtype), *arguments)[1]
            assert compile_launch(launch, capability, tmp_path).spilled == 0


def rows_launch(
    channels: int, front: str = "", static: bool = False, rotation: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Launch:
    kind = FRONTS[front] if front else Front()
    x = meta(32760, 2 * channels if kind.gated else channels, dtype=dtype)
    affine = meta(1, channels, dtype=dtype) if kind.norm else None
    step = meta(1) if static else None
    transform = (meta(channels), meta(channels))
    return quantize.plan_rows(x, kind, affine, affine, 1e-6, *transform, step, 8, rotation)[2]


class TestQuantizers:
    @staticmethod
    def assert_streams(launch: Launch, capability: int, folder: Path) -> Compiled:
        """16-byte loads and stores, nothing spilled, no product and sum contracted."""
        compiled = compile_launch(launch, capability, folder)
        assert compiled.count(r"ld\.global\.v4\.b32") > 0
        assert compiled.count(r"st\.global\.v4\.b32") > 0
        assert compiled.spilled == 0
        assert compiled.shared <= SHARED_MEMORY[architecture(capability)]
        return compiled

    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("channels", [1536, 13824])
    def test_rows(self, channels: int, capability: int, tmp_path: Path) -> None:
        compiled = self.assert_streams(rows_launch(channels), capability, tmp_path)
        assert compiled.count(r"fma\.") == 0
        # One division per row and one reciprocal; none per channel.
        assert compiled.count(r"div\.(full|approx)") == 0

    @pytest.mark.parametrize(
        "arguments",
        [{"static": True}, {"rotation": 128}, {"static": True, "rotation": 128}, {"dtype": torch.float32}],
        ids=["static", "rotated", "static rotated", "float32"],
    )
    def test_other_rows(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        self.assert_streams(rows_launch(5120, **arguments), 90, tmp_path)

    @pytest.mark.parametrize("static", [False, True])
    def test_rows_too_long_for_registers(self, static: bool, tmp_path: Path) -> None:
        self.assert_streams(rows_launch(20480, static=static, rotation=64), 90, tmp_path)

    @pytest.mark.parametrize("front", FRONTS)
    def test_fronts(self, front: str, tmp_path: Path) -> None:
        self.assert_streams(rows_launch(5120, front), 90, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("capability", [75, *CAPABILITIES])
    @pytest.mark.parametrize("front", ["", *FRONTS])
    def test_every_kind_of_rows(self, front: str, capability: int, tmp_path: Path) -> None:
        for channels in (1536, 3072, 5120):
            for static, rotation in ((False, 0), (True, 128)):
                compiled = compile_launch(rows_launch(channels, front, static, rotation), capability, tmp_path)
                # Two words at most: ptxas gives a register away to fit one more block on a multiprocessor.
                assert compiled.spilled <= 8, (channels, static, rotation)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("static", [False, True])
    def test_images(self, static: bool, channels_last: bool, tmp_path: Path) -> None:
        x = meta(16, 320, 64, 64, dtype=torch.bfloat16)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        step = meta(1) if static else None
        launches = quantize.plan_images(x, meta(320), meta(320), step, 8, 0, [1, 1, 1, 1])[2]
        assert len(launches) == (1 if static else 2)
        compiled = [compile_launch(launch, 90, tmp_path) for launch in launches]
        assert all(kernel.spilled == 0 for kernel in compiled)
        assert compiled[-1].count(r"st\.global\.v4\.b32") > 0
        assert (compiled[-1].count(r"ld\.global\.b16") == 0) == channels_last  # a padded line starts anywhere


class TestTheRest:
    @pytest.mark.parametrize("capability", [75, 90])
    def test_epilogue_of_another_librarys_sums(self, capability: int, tmp_path: Path) -> None:
        bias, residual, gate = (meta(*shape, dtype=torch.float16) for shape in ((5120,), (4096, 5120), (2, 5120)))
        total = meta(4096, 5120, dtype=torch.int32)
        launch = gemm.plan_dequantize(total, meta(4096, 1), meta(5120, 1), bias, residual, gate, torch.float16)[1]
        compiled = compile_launch(launch, capability, tmp_path)
        assert compiled.count(r"ld\.global\S*\.v4\.b32") > 0
        assert compiled.count(r"fma\.") == 0 and compiled.spilled == 0

    def test_unpacking(self, tmp_path: Path) -> None:
        launch = gemm.plan_unpack(meta(5120, 2560, dtype=torch.uint8), 5120)[1]
        compiled = compile_launch(launch, 90, tmp_path)
        assert compiled.count(r"st\.global\.v4\.b32") > 0 and compiled.spilled == 0
