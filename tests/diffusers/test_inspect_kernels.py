"""`qvd inspect --kernels`: what would run here for a quantized folder, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNetMotionModel, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from qvd_core.ops.dispatch import Choice
from qvd_diffusers import QVDConfig, QVDError, calibrate, kernels
from qvd_diffusers.attention import AttentionChoice
from qvd_diffusers.cli import main
from qvd_diffusers.kernels import describe_kernels
from tests.diffusers.tiny import PROMPTS, WAN_CALL

FAST, SMALL = Choice("fast", "it has tiles"), Choice("small", "16 rows or fewer: nothing to tile")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A machine with one backend for many rows and another for few; what it was asked for."""
    asked: list[tuple[str, str]] = []

    def explain(name: str, device: torch.device) -> tuple[Choice, Choice]:
        asked.append((name, str(device)))
        return FAST, SMALL

    monkeypatch.setattr(kernels, "explain_backend", explain)
    monkeypatch.delenv("QVD_BACKEND", raising=False)
    return asked


@pytest.fixture(scope="module")
def quantized_wan(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a quantized transformer. Read-only."""
    folder = tmp_path_factory.mktemp("quantized")
    WanPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig()).save_pretrained(folder)
    return folder


def save_unet(animate_folder: Path, folder: Path, config: QVDConfig) -> Path:
    UNetMotionModel.from_pretrained(animate_folder / "unet", quantization_config=config).save_pretrained(folder)
    return folder


def cells(printed: str) -> list[list[str]]:
    """The rows of the table, whose columns are at least two blanks apart."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layers"))
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 :]]
    return [row for row in rows if len(row) == 8]


def record_attention(source: Path, copy: Path, attention: str | None) -> Path:
    shutil.copytree(source, copy)
    path = copy / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["_attention"] = attention
    path.write_text(json.dumps(config))
    return copy


def test_layers_with_one_shape_share_a_line(quantized_wan: Path) -> None:
    printed = describe_kernels(quantized_wan)
    both = "fast; small for 16 rows or fewer"
    assert cells(printed) == [
        ["16", "linear", "32", "32", "-", "8 bit", "8 bit per token", both],
        ["2", "linear", "32", "64", "-", "8 bit", "8 bit per token", both],
        ["2", "linear", "64", "32", "-", "8 bit", "8 bit per token", both],
        ["1", "temporal", "32", "192", "-", "8 bit", "8 bit codebook", "float32"],
    ]
    assert printed.startswith(f"{quantized_wan / 'transformer'} on cpu:")
    for line in ("fast: it has tiles.", "small: 16 rows or fewer: nothing to tile.", "float32: few rows times"):
        assert line in printed


def test_one_backend_for_all_is_said_once(quantized_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "explain_backend", lambda *_: (FAST, FAST))
    printed = describe_kernels(quantized_wan)
    assert [row[-1] for row in cells(printed)] == ["fast", "fast", "fast", "float32"]
    assert printed.count("it has tiles") == 1


def test_convolutions_always_count_as_many_rows(animate_folder: Path, tmp_path: Path) -> None:
    rows = cells(describe_kernels(save_unet(animate_folder, tmp_path, QVDConfig())))
    assert ["8", "conv2d", "16", "16", "3x3", "8 bit", "8 bit per image", "fast"] in rows
    assert ["2", "conv2d", "32", "16", "1x1", "8 bit", "8 bit per image", "fast"] in rows
    assert sum(int(row[0]) for row in rows) == 113


def test_packed_convolutions_show_what_the_file_tells(animate_folder: Path, tmp_path: Path) -> None:
    printed = describe_kernels(save_unet(animate_folder, tmp_path, QVDConfig(weight_bits=4)))
    rows = cells(printed)
    assert ["8", "conv2d", "144", "16", "?", "4 bit", "8 bit per image", "fast"] in rows
    assert ["8", "linear", "16", "128", "-", "4 bit", "8 bit per token", "fast; small for 16 rows or fewer"] in rows
    assert 'kernel "?": a packed weight does not tell; inputs are channels times taps.' in printed


def test_static_activations_are_told_apart(wan_folder: Path, wan_pipe: WanPipeline, tmp_path: Path) -> None:
    config = QVDConfig(activation="static", activation_bits=6)
    config.scales = calibrate(wan_pipe, PROMPTS, config=config, cache=False, progress=False, **WAN_CALL)
    WanTransformer3DModel.from_pretrained(wan_folder / "transformer", quantization_config=config).save_pretrained(
        tmp_path
    )
    modes = {row[6]: int(row[0]) for row in cells(describe_kernels(tmp_path)) if row[1:3] == ["linear", "32"]}
    assert modes.keys() == {"6 bit static", "6 bit per token"}  # layers that read the prompt stay dynamic


def test_it_asks_for_the_recorded_backend_and_the_device(
    quantized_wan: Path, tmp_path: Path, chosen: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(quantized_wan, tmp_path / "copy")
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"backend": "auto"', '"backend": "reference"'))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    printed = describe_kernels(folder, "cuda:1")
    assert chosen == [("reference", "cuda:1")] and "on cuda:1 (Some GPU):" in printed


@pytest.mark.parametrize(
    ("attention", "backend", "line"),
    [
        (None, None, "the model's own; attention=\"auto\" would use the model's own here (a reason)."),
        (None, "sage", 'the model\'s own; attention="auto" would use sage here (a reason).'),
        ("auto", "sage", '"auto" is recorded and uses sage here (a reason).'),
        ("auto", None, '"auto" is recorded and uses the model\'s own here (a reason).'),
        ("native", None, '"native" is recorded and is set when the model is loaded.'),
        ("sage_hub", None, '"sage_hub" is recorded and cannot be set here: its kernels come from the Hub'),
    ],
)
def test_one_line_tells_of_attention(
    attention: str | None,
    backend: str | None,
    line: str,
    quantized_wan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def automatic(device: torch.device, dtype: torch.dtype) -> AttentionChoice:
        asked.append((device.type, dtype))
        return AttentionChoice(backend, "a reason")

    monkeypatch.setattr(kernels, "automatic_attention", automatic)
    printed = describe_kernels(record_attention(quantized_wan, tmp_path / "copy", attention))
    assert f"\nAttention: {line}" in printed
    assert asked in ([], [("cpu", torch.float32)])  # the type the model was saved in


def test_the_layer_listing_names_a_recorded_attention(
    quantized_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(record_attention(quantized_wan, tmp_path / "auto", "auto"))]) == 0
    assert "\nAttention: 'auto' is recorded" in capsys.readouterr().out
    assert main(["inspect", str(quantized_wan)]) == 0
    assert "Attention" not in capsys.readouterr().out


def test_threads_and_the_environment_are_reported(quantized_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = describe_kernels(quantized_wan)
    assert f"\nThreads: {torch.get_num_threads()} " in printed and "QVD_BACKEND" not in printed
    monkeypatch.setenv("QVD_BACKEND", "emulated")
    assert "\nQVD_BACKEND=emulated is set" in describe_kernels(quantized_wan)


def test_no_model_is_loaded(quantized_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(WanTransformer3DModel, name, lambda *_, **__: pytest.fail("loaded"))
    assert cells(describe_kernels(quantized_wan / "transformer"))


def test_the_command_prints_the_table(quantized_wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized_wan), "--kernels"]) == 0
    assert capsys.readouterr().out == describe_kernels(quantized_wan, "cpu") + "\n"


@pytest.mark.parametrize(
    ("path", "device", "message"),
    [
        ("{wan}", "no-such", "'no-such' is no device"),
        ("{wan}", "cuda:9", "there is no device 'cuda:9' here"),
        ("{wan}/model_index.json", "cpu", "is a file"),
        ("{wan}/scheduler", "cpu", "holds no model quantized by QVD"),
        ("{wan}/nowhere", "cpu", "does not exist"),
    ],
)
def test_bad_input_is_one_line(
    path: str, device: str, message: str, quantized_wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", path.format(wan=quantized_wan), "--kernels", "--device", device]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.fixture
def damaged(quantized_wan: Path, tmp_path: Path) -> Callable[[torch.Tensor | None], Path]:
    """A copy of the folder whose first planned weight is another tensor, or missing."""

    def make(weight: torch.Tensor | None) -> Path:
        folder = shutil.copytree(quantized_wan, tmp_path / "damaged") / "transformer"
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        del tensors["blocks.0.attn1.to_q.weight"]
        if weight is not None:
            tensors["blocks.0.attn1.to_q.weight"] = weight
        save_file(tensors, path)
        return folder

    return make


@pytest.mark.parametrize(
    ("weight", "message"), [(None, "has no blocks.0.attn1.to_q.weight"), (torch.zeros(8), r"has the shape \[8\]")]
)
def test_damage_is_named(
    weight: torch.Tensor | None, message: str, damaged: Callable[[torch.Tensor | None], Path]
) -> None:
    with pytest.raises(QVDError, match=message):
        describe_kernels(damaged(weight))
