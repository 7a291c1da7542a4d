"""The command `qvd`, run inside this process: what it writes, what it prints, how it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from qvd_diffusers import Scales
from qvd_diffusers.cli import main
from tests.diffusers.tiny import PROMPTS, WAN_CALL


@pytest.fixture
def call_file(tmp_path: Path) -> Path:
    path = tmp_path / "call.json"
    path.write_text(json.dumps(WAN_CALL))
    return path


def test_from_calibration_to_comparison(
    wan_folder: Path, tmp_path: Path, call_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    scales, out = tmp_path / "scales.safetensors", tmp_path / "int8"

    assert (
        main(["calibrate", str(wan_folder), "--prompts", str(prompts), "--call", str(call_file), "--out", str(scales)])
        == 0
    )
    assert Scales.load(scales).calibrated_on["prompts"] == PROMPTS
    assert "20 layers and 1 temporal projections" in capsys.readouterr().out

    assert main(["inspect", str(scales)]) == 0
    assert "blocks.0.attn1.to_q" in capsys.readouterr().out

    assert (
        main(["quantize", str(wan_folder), "--scales", str(scales), "--out", str(out), "--activation", "static"]) == 0
    )
    assert "21 int8 layers" in capsys.readouterr().out
    assert DiffusionPipeline.from_pretrained(out).transformer.hf_quantizer.quantization_config.activation == "static"

    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "blocks.1.ffn.net.2" in printed and "I8 32x64" in printed and "temporal" in printed
    assert "21 quantized layers (20 linear, 1 temporal)" in printed

    assert main(["compare", str(wan_folder), str(out), "--prompt", *PROMPTS, "--call", str(call_file)]) == 0
    printed = capsys.readouterr().out
    mean = next(line for line in printed.splitlines() if line.startswith("mean"))
    assert float(mean.split()[1]) > 30


def test_the_data_free_way_needs_only_two_folders(wan_folder: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(wan_folder), "--out", str(tmp_path / "int8"), "--preset", "fast"]) == 0
    assert DiffusionPipeline.from_pretrained(tmp_path / "int8").transformer.is_quantized


@pytest.mark.parametrize("command", ["calibrate", "quantize", "inspect", "compare"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "usage: qvd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "{wan}", "--out", "{tmp}/s"], "no prompts"),
        (["calibrate", "{wan}", "--prompts", "{tmp}/none.txt", "--out", "{tmp}/s"], "No such file"),
        (["calibrate", "{tmp}", "--prompt", "a", "--out", "{tmp}/s"], "not a pipeline folder"),
        (["calibrate", "{tmp}/nowhere/at/all", "--prompt", "a", "--out", "{tmp}/s"], "neither a pipeline folder"),
        (["calibrate", "{wan}", "--prompt", "a", "--call", "{tmp}/list.json", "--out", "{tmp}/s"], "JSON object"),
        (["calibrate", "{wan}", "--prompt", "a", "--call", "{tmp}/broken.json", "--out", "{tmp}/s"], "not valid JSON"),
        (["quantize", "{wan}", "--out", "{wan}"], "would overwrite"),
        (["quantize", "{wan}", "--out", "{tmp}"], "not empty"),
        (["quantize", "{wan}", "--out", "{tmp}", "--force"], "not a pipeline folder, --force replaces nothing else"),
        (["quantize", "{wan}", "--out", "{tmp}/o", "--weight-bits", "3"], "weight_bits must be"),
        (["quantize", "{wan}", "--out", "{tmp}/o", "--scales", "{tmp}/none"], "does not exist"),
        (["quantize", "{wan}", "--out", "{tmp}/o", "--component", "unet"], "no component to quantize"),
        (["quantize", "{torchao}", "--out", "{tmp}/o"], "quantized already, by torchao"),
        (["inspect", "{wan}"], "holds no model quantized by QVD"),
        (["inspect", "{tmp}/nowhere"], "does not exist"),
        (["inspect", "{tmp}/list.json"], "damaged or no safetensors file"),
        (["compare", "{wan}", "{tmp}", "--prompt", "a"], "not a pipeline folder"),
        (["compare", "{wan}", "{wan}", "--prompt", "a"], "invalid for input"),  # the default size is too large
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("{")
    if "{torchao}" in arguments:
        config = shutil.copytree(wan_folder, tmp_path / "torchao") / "transformer" / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}})
        )
    filled = [text.format(wan=wan_folder, tmp=tmp_path, torchao=tmp_path / "torchao") for text in arguments]
    assert main(filled) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint.splitlines()[-1]
    assert "Traceback" not in complaint
    assert not (tmp_path / "o").exists() and not (tmp_path / "s").exists()


def test_bad_values_end_with_one_line(
    wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = tmp_path / "call.json"
    common = ["calibrate", str(wan_folder), "--prompt", "a", "--call", str(call), "--out", str(tmp_path / "s")]
    for content in ({"config": 1}, {"num_inference_steps": "two"}):
        call.write_text(json.dumps(content))
        assert main(common) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert not (tmp_path / "s").exists()


def test_a_failed_replacement_keeps_the_old_folder(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int8"
    shutil.copytree(wan_folder, out)
    (out / "notes.txt").write_text("mine")

    def full_disk(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", full_disk)
    assert main(["quantize", str(wan_folder), "--out", str(out), "--force"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine" and (out / "model_index.json").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".qvd-")] == []


def test_an_unwritable_output_is_known_before_the_work(
    wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["calibrate", str(wan_folder), "--prompt", "a", "--out", str(tmp_path / "file" / "scales.safetensors")]
    assert main(arguments) == 2
    assert "choose a writable folder" in capsys.readouterr().err


def test_two_experts_get_a_file_of_scales_each(
    wan22_folder: Path, tmp_path: Path, call_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scales, out = tmp_path / "scales.safetensors", tmp_path / "int8"
    call = ["--prompt", PROMPTS[0], "--call", str(call_file)]
    assert main(["calibrate", str(wan22_folder), *call, "--out", str(scales)]) == 0
    files = [tmp_path / f"scales.{name}.safetensors" for name in ("transformer", "transformer_2")]
    printed = capsys.readouterr().out
    assert all(str(path) in printed and path.is_file() for path in files) and not scales.exists()
    static = ["--activation", "static"]  # nothing but calibrated scales can give it
    assert main(["quantize", str(wan22_folder), "--scales", str(scales), "--out", str(out), *static]) == 0
    pipe = DiffusionPipeline.from_pretrained(out)
    for path, model in zip(files, (pipe.transformer, pipe.transformer_2), strict=True):
        name = "blocks.0.attn1.to_out.0"
        step = Scales.load(path).layers[name].static_step
        assert step is not None and model.get_submodule(name).activation_scale.isclose(step, rtol=0.5)


def test_a_model_can_be_calibrated_without_its_float_weights_in_memory(
    wan_folder: Path, tmp_path: Path, call_file: Path
) -> None:
    scales = tmp_path / "scales.safetensors"
    call = ["--prompt", PROMPTS[0], "--call", str(call_file)]
    assert main(["calibrate", str(wan_folder), *call, "--low-memory", "--out", str(scales)]) == 0
    assert Scales.load(scales).layers
    assert main(["quantize", str(wan_folder), "--scales", str(scales), "--out", str(tmp_path / "int8")]) == 0
