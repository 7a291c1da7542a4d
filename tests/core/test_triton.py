"""The Triton backend without a GPU: its kernels under the interpreter, and its table of tiles."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qvd_core.errors import QVDError
from qvd_core.ops.triton import missing, tune
from qvd_core.ops.triton.tiles import KINDS, SHARED_MEMORY, TABLE, architecture, find_tile, read_tiles, write_tiles

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = "tests/core/triton_interpreted.py"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--noconftest"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    run = subprocess.run([*command, INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter reads CPU tensors")
def test_missing_says_why() -> None:
    reason = missing(torch.device("cpu"))
    assert reason in ("it has no cpu kernels", "triton is not installed")


class TestTiles:
    @pytest.mark.parametrize(
        ("capability", "expected"),
        [
            *((80, "sm80"), (86, "sm89"), (87, "sm89"), (89, "sm89"), (90, "sm90")),
            *((100, "sm100"), (103, "sm100"), (120, "sm120"), (121, "sm120")),
        ],
    )
    def test_every_gpu_has_a_class(self, capability: int, expected: str) -> None:
        assert architecture(capability) == expected

    @pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_shape_has_a_tile_that_fits_the_shared_memory(self, kind: str, capability: int) -> None:
        for m in (1, 16, 17, 300, 100_000):
            for n, k in ((4, 4), (64, 320), (1536, 1536), (5120, 13824)):
                tile = find_tile(kind, capability, m, n, k)
                operand = 2 if kind == "weight_only" else 1
                in_flight = (tile.block_m * operand + tile.block_n) * tile.block_k * tile.stages
                assert in_flight <= SHARED_MEMORY[architecture(capability)]

    def test_the_first_rule_that_fits_is_taken(self) -> None:
        rules = read_tiles(TABLE)["sm80"]["linear"]
        assert find_tile("linear", 80, rules[0].max_m, 5120, 5120) == rules[0]
        assert find_tile("linear", 80, rules[0].max_m + 1, 5120, 5120) == rules[1]
        assert find_tile("linear", 80, 10**6, 10**6, 10**6) == rules[-1]

    def test_written_tables_are_read_back(self, tmp_path: Path) -> None:
        write_tiles(tmp_path / "tiles.json", read_tiles(TABLE), 'a "note"')
        assert read_tiles(tmp_path / "tiles.json") == read_tiles(TABLE)
        assert json.loads((tmp_path / "tiles.json").read_text())["note"] == 'a "note"'

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block_m": 48}, "block_m must be a power of two from 16 to 256, got 48"),
            ({"block_k": 512}, "block_k must be a power of two from 32 to 256, got 512"),
            ({"stages": 0}, "stages must be a number from 1 to 8, got 0"),
            ({"warps": True}, "warps must be a power of two from 1 to 16, got True"),
            ({"max_m": "all"}, "max_m must be a number"),
            ({"color": 1}, "must name block_m"),
            ({"max_k": 64}, "the last rule of sm90.conv must fit every shape"),
        ],
    )
    def test_a_rule_that_cannot_be_launched_is_refused(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        content = json.loads(TABLE.read_text())
        content["tiles"]["sm90"]["conv"][-1] |= change
        (tmp_path / "tiles.json").write_text(json.dumps(content))
        with pytest.raises(QVDError, match=message):
            read_tiles(tmp_path / "tiles.json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "not of version 1"),
            ('{"version": 2}', "not of version 1"),
            ('{"version": 1, "tiles": {"sm80": {"linear": []}}}', "no rules for sm80.linear"),
        ],
    )
    def test_a_damaged_table_is_refused(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "tiles.json").write_text(text)
        with pytest.raises(QVDError, match=message):
            read_tiles(tmp_path / "tiles.json")


class TestTune:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
    def test_without_a_gpu_it_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(QVDError, match="no CUDA GPU to tune on"):
            tune.tune(["linear"], tmp_path / "tiles.json")
        assert not (tmp_path / "tiles.json").exists()

    @pytest.mark.parametrize("kind", KINDS)
    def test_candidates_fit_the_shared_memory_and_the_table(self, kind: str, tmp_path: Path) -> None:
        tried = list(tune.candidates(kind, SHARED_MEMORY["sm89"]))
        assert len(tried) > 10
        table = read_tiles(TABLE)
        table["sm89"][kind] = tried
        write_tiles(tmp_path / "tiles.json", table, "")
        assert read_tiles(tmp_path / "tiles.json")["sm89"][kind] == tried
