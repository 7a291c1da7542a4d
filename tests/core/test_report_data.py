"""A report as data: what is collected from plan, scales and shapes, and that JSON gives it back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvd_core import QuantSpec, QVDError, Scales, quantize_model
from qvd_core.plan import LayerPlan, plan_layers
from qvd_core.report import Report, collect, report_of_model
from qvd_core.report.collect import planned_bytes
from qvd_core.report.kept import FAMILY, NAMED, SENSITIVE
from qvd_core.report.places import in_depth_order, natural_order, places
from qvd_core.sensitivity import END_EFFECT
from tests.core.conftest import Denoiser
from tests.core.report_cases import FIGURES, HOSTILE, PLAN, SHAPES, SPEC, scales


@pytest.fixture
def report() -> Report:
    return collect(PLAN, SPEC, SHAPES, scales(), family_name="Toy", model_name="Toy", kept={"proj_out": "why"})


def test_json_gives_the_report_back_and_holds_neither_nan_nor_infinity(report: Report) -> None:
    measured = replace(report, quality={"psnr_db": None, "ssim": 0.99})
    text = measured.to_json()
    assert Report.from_json(text) == measured

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["calibrated_on"]["call"] == {"guidance_scale": None}


def test_infinite_figures_become_none() -> None:
    found = collect(PLAN, SPEC, SHAPES, quality={"psnr_db": math.inf, "ssim": 1.0}, speed={"x": math.nan})
    assert found.quality == {"psnr_db": None, "ssim": 1.0} and found.speed == {"x": None}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("[1]", "no version"),
        ("{", "not the JSON"),
        ('{"version": 99}', "update QVD"),
        ('{"version": true}', "no version"),
        ('{"version": 1, "model": "a"}', "incomplete"),
        ('{"version": 1, "model": 3, "family": "", "settings": {}, "layers": []}', "report.model is int"),
        ('{"version": 1, "model": "", "family": "", "settings": {}, "layers": [{"name": 1}]}', "layers\\[0\\].name"),
        ('{"version": 1, "model": "", "family": "", "settings": {}, "layers": {}}', "report.layers is dict"),
        ('{"version": 1, "nonsense": 1}', "unknown entry 'nonsense'"),
        ('{"version": 1, "model": "", "family": "", "settings": {}, "layers": [], "speed": {"a": "b"}}', "speed.a"),
    ],
)
def test_damaged_json_is_one_clear_error(damage: str, message: str) -> None:
    with pytest.raises(QVDError, match=message):
        Report.from_json(damage)


def test_layers_have_their_figures_places_and_sizes(report: Report) -> None:
    layer = next(layer for layer in report.layers if layer.name == "blocks.0.conv")
    assert (layer.block, layer.part, layer.kind, layer.shape) == ("blocks.0", "conv", "conv2d", (6, 4, 3, 3))
    assert layer.sqnr_db == 33.0 and layer.coverage_before == 0.5
    # int8 codes, float32 scale and bias per output channel, float32 shift and scale per input channel
    assert layer.bytes == 6 * 4 * 9 + 4 * 6 + 4 * 6 + 2 * 4 * 4
    assert [layer.name for layer in report.worst(2)] == ["blocks.1.to_q", "blocks.0.conv"]
    assert report.mean("sqnr_db") == pytest.approx((41.5 + 33 + 25.25 + 52) / 4)


def test_channel_ranges_are_shares_of_the_largest_value_widest_first(report: Report) -> None:
    ranges = report.ranges[0]
    assert ranges.layer == "blocks.1.to_q" and ranges.channels == 4
    assert ranges.before[:2] == ((0.0, 1.0), (-0.25, 0.25))  # of 8
    assert ranges.after[:2] == ((-1.0, 1.0), (-1.0, 1.0))
    assert ranges.after[2] == (-1.0, 1.0) and ranges.after[3] == (-0.5, 0.5)


def test_layers_that_read_one_input_are_shown_once(report: Report) -> None:
    assert len(report.ranges) == 1  # all have the same ranges


def test_scales_of_older_files_still_give_drift_and_temporal_figures(report: Report) -> None:
    assert report.drift[0].reach == (0.5, 1.0) and report.drift[0].timesteps == (200.0, 600.0)
    deployed = report.temporal[0].deployed
    assert deployed is not None and deployed.name == "uniform"
    assert deployed.tdr == 0.995 and deployed.td_score == pytest.approx(0.8 * 0.995)


def test_without_data_there_are_bits_kinds_shapes_and_sizes_and_nothing_else() -> None:
    found = collect(PLAN, replace(SPEC, weight_bits=4), SHAPES, float_bytes=100, int8_bytes=30)
    assert [layer.kind for layer in found.layers] == [layer.kind for layer in PLAN.values()]
    assert [layer.weight_bits for layer in found.layers] == [4, 4, 4, 4, 8]  # temporal weights stay at 8
    assert all(layer.bytes > 0 and layer.sqnr_db is None for layer in found.layers)
    assert found.ranges == found.drift == found.temporal == () and found.worst(9) == []


def test_scales_alone_give_a_report_without_sizes() -> None:
    found = collect({}, SPEC, {}, scales())
    assert [layer.name for layer in found.layers] == [name for name in PLAN if name != "time_proj"] + ["time_proj"]
    assert found.model == "ToyTransformer" and all(layer.bytes == 0 and layer.kind == "" for layer in found.layers)


def test_scales_of_another_model_are_refused() -> None:
    with pytest.raises(QVDError, match="know none of the 1 layers"):
        collect({"other": LayerPlan("linear")}, SPEC, {"other": (4, 4)}, scales())


def test_names_are_split_into_block_and_part() -> None:
    names = [
        "blocks.3.attn1.to_out.0",
        "blocks.3.ffn.net.0.proj",
        "blocks.11.ffn.net.2",
        "condition_embedder.time_proj",
    ]
    assert list(places(names).values()) == [
        ("blocks.3", "attn1.to_out.0"),
        ("blocks.3", "ffn.net.proj"),
        ("blocks.11", "ffn.net.2"),
        ("", "condition_embedder.time_proj"),
    ]
    nested = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert places([nested, "mid_block.resnets.0.conv1"]) == {
        nested: ("down_blocks.1", "attentions.attn1.to_q"),
        "mid_block.resnets.0.conv1": ("mid_block", "resnets.conv1"),
    }
    assert places(["transformer.blocks.0.q", "transformer.blocks.1.q"])["transformer.blocks.1.q"] == ("blocks.1", "q")
    assert natural_order(["b.10.q", "b.2.q", "b.2.attn", "a"]) == ["a", "b.2.attn", "b.2.q", "b.10.q"]
    assert in_depth_order(["down_blocks.0", "up_blocks.0", "mid_block"]) == [
        "down_blocks.0",
        "mid_block",
        "up_blocks.0",
    ]


@pytest.mark.parametrize("which", ["wan", "unet"])
@pytest.mark.parametrize("settings", [{}, {"activation": "static_bucket"}, {"weight_bits": 4, "rounding": "nearest"}])
def test_planned_bytes_are_those_of_the_layers_that_are_built(
    which: str, settings: dict[str, object], request: pytest.FixtureRequest
) -> None:
    denoiser: Denoiser = request.getfixturevalue(which)
    spec = QuantSpec(**settings)  # type: ignore[arg-type]
    found: Scales = request.getfixturevalue(f"{which}_scales")
    plan = plan_layers(denoiser.model, spec, found)
    shapes = {name: tuple(denoiser.model.get_submodule(name).weight.shape) for name in plan}
    report = report_of_model(denoiser.model, spec, found)
    model = quantize_model(denoiser.copy(), spec, found)
    for name, layer in plan.items():
        tensors = model.get_submodule(name).state_dict().values()
        assert planned_bytes(layer, shapes[name], spec) == sum(tensor.nbytes for tensor in tensors), name
    assert report.int8_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.float_bytes == sum(tensor.nbytes for tensor in denoiser.model.state_dict().values())


def test_every_layer_of_a_model_is_quantized_or_kept_for_a_reason(wan: Denoiser, wan_scales: Scales) -> None:
    spec = QuantSpec(modules_to_not_convert=("blocks.0.attn1.to_k",), auto_keep=40.0)
    measured = replace(wan_scales, report={name: {END_EFFECT: 50.0} for name in wan_scales.layers})
    measured.report["blocks.1.attn1.to_q"] = {END_EFFECT: 30.0}
    found = report_of_model(wan.model, spec, measured)
    linears = {name for name, module in wan.model.named_modules() if type(module).__name__ in ("Linear", "Conv3d")}
    assert {layer.name for layer in found.layers} | set(found.kept) == linears
    assert found.kept["proj_out"] == FAMILY and found.kept["blocks.0.attn1.to_k"] == NAMED
    assert found.kept["blocks.1.attn1.to_q"].startswith(SENSITIVE) and "30.0 dB" in found.kept["blocks.1.attn1.to_q"]


def test_calibration_remembers_what_only_it_sees(wan: Denoiser, wan_scales: Scales, tmp_path: Path) -> None:
    loaded = Scales.load(wan_scales.save(tmp_path / "scales.safetensors"))
    assert loaded.observed == json.loads(json.dumps(wan_scales.observed))
    found = report_of_model(wan.model, loaded.spec, loaded)
    temporal = found.temporal[0]
    assert temporal.timesteps == (900.0, 500.0, 100.0) and len(temporal.distances) == 3
    assert {item.name for item in temporal.quantizers} >= {"uniform", "log2", "power", "logk"}
    assert temporal.deployed is not None and temporal.deployed.name == next(iter(loaded.temporal.values())).name
    assert len(found.drift) > 0 and all(max(drift.reach) == 1.0 for drift in found.drift)


def test_the_observed_distances_are_those_of_the_features(wan: Denoiser, wan_scales: Scales) -> None:
    embedder = wan.model.condition_embedder
    with torch.no_grad():
        rows = [
            torch.nn.functional.silu(embedder.time_embedder(embedder.timesteps_proj(torch.tensor([float(step)]))))[0]
            for step in (900, 500, 100)
        ]
    centred = torch.stack(rows).double() - torch.stack(rows).double().mean(dim=0)
    expected = [
        float((centred[i] - centred[j]).norm() / (centred[i].norm() + centred[j].norm()))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert wan_scales.observed["temporal"][0]["distances"] == pytest.approx(expected, abs=2e-4)


def test_a_summary_that_fails_is_one_warning_and_no_failed_calibration(
    wan: Denoiser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("no steps")

    monkeypatch.setattr("qvd_core.report.observed.pair_distances", broken)
    found = wan.calibrate()
    assert found.layers and found.temporal and found.observed == {}
    assert [record.getMessage() for record in caplog.records if "ZeroDivisionError: no steps" in record.getMessage()]


def test_files_without_or_with_damaged_summaries(tmp_path: Path) -> None:
    plain = scales()
    assert Scales.load(plain.save(tmp_path / "a")).observed == {}
    plain.observed = {"temporal": [{"layers": 3}]}
    loaded = Scales.load(plain.save(tmp_path / "b"))
    with pytest.raises(QVDError, match="damaged"):
        collect(PLAN, SPEC, SHAPES, loaded)


def test_figures_of_layers_outside_the_plan_do_no_harm() -> None:
    found = collect({"blocks.0.to_q": PLAN["blocks.0.to_q"]}, SPEC, SHAPES, scales())
    assert [layer.name for layer in found.layers] == ["blocks.0.to_q"]
    assert found.layers[0].sqnr_db == FIGURES["blocks.0.to_q"]["sqnr_db"] and HOSTILE not in found.to_json()
