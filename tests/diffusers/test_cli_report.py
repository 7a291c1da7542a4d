"""`qvd report`, and the report a calibration writes: from files alone, and never in the way of a calibration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from qvd_core.report import Report
from qvd_diffusers import QVDConfig, Scales, calibrate
from qvd_diffusers.cli import main
from qvd_diffusers.cli_report import read_reports
from tests.diffusers.tiny import PROMPTS, WAN_CALL

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib, which is an extra"
)


def calibrated(folder: Path, **options: object) -> Scales:
    pipe = DiffusionPipeline.from_pretrained(folder)
    return calibrate(pipe, PROMPTS[:1], cache=False, progress=False, **options, **WAN_CALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scales.safetensors, report.html and report.json of a calibration, and int8/, what was quantized with them."""
    folder = tmp_path_factory.mktemp("report")
    calibrated(wan_folder, report=folder / "report.html").save(folder / "scales.safetensors")
    arguments = ["quantize", str(wan_folder), "--scales", str(folder / "scales.safetensors")]
    assert main([*arguments, "--out", str(folder / "int8")]) == 0
    return folder


def test_a_calibration_writes_the_report_of_what_will_be_quantized(files: Path) -> None:
    planned = Report.from_json((files / "report.json").read_text())
    (built,) = read_reports(files / "int8", files / "scales.safetensors").values()
    assert sorted(planned.layers, key=str) == sorted(built.layers, key=str) and len(built.layers) == 21
    assert planned.ranges == built.ranges and planned.drift == built.drift and planned.temporal == built.temporal
    assert planned.kept == built.kept and "proj_out" in built.kept
    assert (planned.model, planned.family) == (built.model, built.family) == ("WanTransformer3DModel", "Wan")
    assert (files / "report.html").stat().st_size > 10_000


def test_the_sizes_are_those_of_the_files_tensors(files: Path, wan_folder: Path) -> None:
    (report,) = read_reports(files / "int8").values()
    sizes = []
    for folder in (wan_folder, files / "int8"):
        model = DiffusionPipeline.from_pretrained(folder).transformer
        sizes.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
    assert report.int8_bytes == sizes[1]
    assert report.float_bytes == pytest.approx(sizes[0], rel=0.02)  # folds may have added biases


@needs_matplotlib
def test_the_command_writes_page_json_and_pictures(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(files / "int8"), "--scales", str(files / "scales.safetensors"), "--out", str(out)]
    assert main([*arguments, "--png", str(tmp_path / "png"), "--title", "Mine"]) == 0
    assert "<h1>Mine</h1>" in out.read_text()
    assert json.loads((tmp_path / "page.json").read_text())["model"] == "WanTransformer3DModel"
    assert (tmp_path / "png" / "summary.png").is_file()
    assert str(out) in capsys.readouterr().out.splitlines()


def test_a_folder_scales_alone_and_a_reports_json_each_give_a_report(files: Path, tmp_path: Path) -> None:
    for path in (files / "int8" / "transformer", files / "scales.safetensors", files / "report.json"):
        out = tmp_path / f"{path.stem}.html"
        assert main(["report", str(path), "--out", str(out)]) == 0
        assert "blocks.0.attn1.to_q" in out.read_text()


@pytest.mark.parametrize("settings", [{"weight_bits": 4}, {"activation": "static_frame"}])
def test_packed_weights_and_static_scales_are_read_from_headers(
    settings: dict[str, object], wan_folder: Path, files: Path, tmp_path: Path
) -> None:
    config = QVDConfig(scales=files / "scales.safetensors", rounding="nearest", **settings)
    DiffusionPipeline.from_pretrained(wan_folder, quantization_config=config).save_pretrained(tmp_path / "out")
    (report,) = read_reports(tmp_path / "out").values()
    layer = next(layer for layer in report.layers if layer.name == "blocks.1.ffn.net.2")
    assert layer.shape == (32, 64) and layer.weight_bits == settings.get("weight_bits", 8)
    assert ("frames" in layer.activation) == ("activation" in settings)


def test_every_denoiser_has_a_page_of_its_own(wan22_folder: Path, tmp_path: Path) -> None:
    calibrated(wan22_folder, report=tmp_path / "report.html")
    assert main(["quantize", str(wan22_folder), "--out", str(tmp_path / "int8")]) == 0
    assert main(["report", str(tmp_path / "int8"), "--out", str(tmp_path / "free.html")]) == 0
    for name in ("transformer", "transformer_2"):
        assert "SQNR" in (tmp_path / f"report.{name}.html").read_text()
        assert "data-free" in (tmp_path / f"free.{name}.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "does not exist"),
        (["{wan}"], "holds no model quantized by QVD"),
        (["{tmp}/list.json"], "no version"),
        (["{tmp}/text.safetensors"], "damaged or no safetensors file"),
        (["{files}/int8", "--scales", "{tmp}/none"], "does not exist"),
        (["{files}/scales.safetensors", "--scales", "{files}/scales.safetensors"], "give one of the two"),
        (["{files}/int8", "--out", "{tmp}/o.txt"], "must be a .html file"),
        (["{files}/int8", "--out", "{tmp}/list.json/o.html"], "choose a folder that is writable"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    files: Path,
    wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "text.safetensors").write_text("no tensors")
    filled = [text.format(tmp=tmp_path, wan=wan_folder, files=files) for text in arguments]
    out = [] if "--out" in filled else ["--out", str(tmp_path / "o.html")]
    assert main(["report", *filled, *out]) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint.splitlines()[-1] and "Traceback" not in complaint
    assert not (tmp_path / "o.html").exists() and not (tmp_path / "o.json").exists()


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", "--help"])
    assert end.value.code == 0 and "--scales" in capsys.readouterr().out


def test_a_report_that_fails_never_fails_the_calibration(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("nothing to draw")

    expected = calibrated(wan_folder)
    monkeypatch.setattr("qvd_diffusers.pipeline.report_of_model", broken)
    found = calibrated(wan_folder, report=tmp_path / "report.html")
    step = "blocks.0.attn1.to_q"
    assert torch.equal(found.layers[step].input_scale, expected.layers[step].input_scale)
    assert [record.getMessage() for record in caplog.records if "No report was written" in record.getMessage()] == [
        f"No report was written to {tmp_path / 'report.html'}: nothing to draw"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_report_is_one_warning(
    wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert calibrated(wan_folder, report=tmp_path / "file" / "report.html").layers
    assert sum("No report was written" in record.getMessage() for record in caplog.records) == 1
