"""The benches of blocks and denoisers: where time goes, Amdahl's ceilings, resuming. The tiny Wan, emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import block, pipeline
from benchmarks.model_speed import Cases, make_wan, profile_shares, quantized, stored_bytes, tokens_of, wan_inputs
from qvd_core import QuantSpec
from qvd_core.layers import QuantLinear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchanged_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_time_of_nested_operators_is_counted_once() -> None:
    layer, *others = (torch.nn.Linear(256, 256).requires_grad_(False) for _ in range(3))
    int8 = quantized(torch.nn.Sequential(others[0], layer, others[1]), "emulated").get_submodule("1")
    assert isinstance(int8, QuantLinear) and int8.spec == QuantSpec(backend="emulated")
    x = torch.randn(256, 256)
    for function in (lambda: layer(x), lambda: int8(x)):  # the emulated product calls a linear of PyTorch inside
        shares = profile_shares(function, CPU)
        assert 0 < shares.linear <= shares.whole
        assert shares.attention == 0


def test_attention_linear_layers_and_the_rest_are_told_apart() -> None:
    x = torch.randn(1, 4, 256, 64)

    def call() -> torch.Tensor:
        return F.gelu(F.scaled_dot_product_attention(x, x, F.linear(x, torch.ones(64, 64))))

    shares = profile_shares(call, CPU)
    assert min(shares.linear, shares.attention, shares.rest) > 0
    assert shares.quantize == 0
    parts = shares.to_dict()
    assert parts["linear"] + parts["attention"] + parts["rest"] == pytest.approx(1.0)


@pytest.mark.parametrize(("share", "gain", "faster"), [(0.5, 2.0, 4 / 3), (0.0, 9.0, 1.0), (1.0, 3.0, 3.0)])
def test_the_ceiling_is_amdahls(share: float, gain: float, faster: float) -> None:
    assert pipeline.ceiling(share, gain) == pytest.approx(faster)


def test_the_ceiling_of_free_linear_layers_is_the_rest() -> None:
    assert pipeline.ceiling(0.75) == pytest.approx(4.0)
    assert pipeline.ceiling(1.0) == float("inf")


def test_a_block_gets_what_the_model_calls_it_with() -> None:
    model = make_wan("tiny", 1, CPU)
    inputs = wan_inputs(model, 2, 8, 8)
    tokens, text, *_ = block.block_arguments(model, inputs)
    assert tokens.shape == (1, tokens_of(2, 8, 8), 128)
    assert text.shape == (1, 512, 128)
    first, int8 = (m.get_submodule("blocks.0") for m in (model, quantized(model, "emulated")))
    assert stored_bytes(int8) < 0.3 * stored_bytes(first)


def test_the_block_bench_measures_every_version_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QVD_BACKEND", "emulated")
    path = tmp_path / "block.json"
    options = ["--device", "cpu", "--sizes", "tiny", "--tokens", "256", "--rounds", "1", "--out", str(path)]
    block.main(options)
    found = Cases(path, {}).known["tiny 256"]
    assert set(found) == {"full precision", "int8 auto", "int8 emulated", "bf16"}
    assert found["int8 emulated"]["sqnr"] > 35
    assert found["int8 emulated"]["weights"] < 0.3
    assert found["full precision"]["speed"] == 1.0
    assert found["full precision"]["shares"]["quantize"] == 0 < found["int8 auto"]["shares"]["quantize"]
    monkeypatch.setattr(block, "measure", None)  # must not be called again
    block.main(options)
    assert "int8 emulated" in capsys.readouterr().out


def test_the_denoiser_bench_measures_a_step_and_its_ceiling_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QVD_BACKEND", "emulated")
    path = tmp_path / "pipeline.json"
    options = ["--device", "cpu", "--sizes", "tiny", "--layers", "1", "--latents", "2x8x8", "--rounds", "1"]
    pipeline.main([*options, "--no-miniatures", "--out", str(path)])
    ((case, figures),) = Cases(path, {}).known.items()
    assert case == "wan tiny, 1 blocks, 32 tokens, auto"
    assert 0 < figures["linear_share"] < 1
    monkeypatch.setattr(pipeline, "measure", None)
    pipeline.main([*options, "--no-miniatures", "--out", str(path)])
    ceiling = pipeline.ceiling(figures["linear_share"], figures["linear_gain"])
    assert f"{ceiling:.2f}×" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3x24", "3x24x25", "0x8x8", "axbxc"])
def test_latents_of_an_impossible_size_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipeline.main(["--latents", text])
    assert "--latents" in capsys.readouterr().err


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    path.write_text('{"format": 7}')
    with pytest.raises(ValueError, match="no file of this benchmark"):
        Cases(path, {})
