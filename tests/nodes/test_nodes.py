"""The nodes: their schemas as data, what they return, what they show, and what they say of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch
from comfy import samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

import qvd_nodes.scale_cache as scale_cache
from qvd_core import QuantSpec, Scales
from qvd_core.errors import QVDError
from qvd_core.presets import PRESETS, preset
from qvd_core.spec import BITS, MOST_BUCKETS
from qvd_nodes.extension import NODES
from qvd_nodes.layers import quantized_layers
from qvd_nodes.nodes.calibrate import Calibrate, CalibrateTwoExperts
from qvd_nodes.nodes.files import OWN_FORMAT, STOCK_FORMAT, LoadDiffusionModel, LoadScales, SaveCheckpoint, SaveScales
from qvd_nodes.nodes.quantize import QuantizeModel, QuantizeSettings
from qvd_nodes.nodes.report import Compare, Report
from qvd_nodes.record import record_of
from qvd_nodes.weights import denoiser
from tests.nodes import models

PROMPTS = {"positive": "COMFY_AUTOGROW_V3", "negative": "CONDITIONING", "latent_image": "LATENT"}
SAMPLER = {"sampler_name": "COMBO", "scheduler": "COMBO"}
CHOICES = {"preset": "COMBO", "use_cache": "BOOLEAN", "settings": "QVD_SETTINGS?"}

# node_id: (inputs by name with their types, "?" for optional ones; outputs). A change here breaks saved workflows.
SCHEMAS: dict[str, tuple[dict[str, str], list[str]]] = {
    "QVDQuantizeModel": (
        {"model": "MODEL", "preset": "COMBO", "scales": "QVD_SCALES?", "settings": "QVD_SETTINGS?"},
        ["MODEL"],
    ),
    "QVDQuantizeSettings": (
        {
            "weight_bits": "INT",
            "activation_bits": "INT",
            "activation": "COMBO",
            "buckets": "INT",
            "shift": "BOOLEAN",
            "scale": "COMBO",
            "range": "COMBO",
            "rotate": "BOOLEAN",
            "rounding": "COMBO",
            "temporal": "COMBO",
            "temporal_quantizer": "COMBO",
            "bias_correction": "BOOLEAN",
            "portable": "BOOLEAN",
            "auto_keep": "FLOAT",
            "modules_to_not_convert": "STRING",
            "backend": "COMBO",
        },
        ["QVD_SETTINGS"],
    ),
    "QVDCalibrate": (
        {"model": "MODEL", **PROMPTS, "seed": "INT", "steps": "INT", "cfg": "FLOAT", **SAMPLER}
        | {"denoise": "FLOAT", **CHOICES, "sigmas": "SIGMAS?"},
        ["QVD_SCALES"],
    ),
    "QVDCalibrateTwoExperts": (
        {"model_high": "MODEL", "model_low": "MODEL", **PROMPTS, "seed": "INT", "steps": "INT", "switch_step": "INT"}
        | {"cfg_high": "FLOAT", "cfg_low": "FLOAT", **SAMPLER, **CHOICES},
        ["QVD_SCALES", "QVD_SCALES"],
    ),
    "QVDLoadScales": ({"scales_name": "COMBO"}, ["QVD_SCALES"]),
    "QVDSaveScales": ({"scales": "QVD_SCALES", "filename_prefix": "STRING"}, ["QVD_SCALES"]),
    "QVDSaveCheckpoint": ({"model": "MODEL", "filename_prefix": "STRING", "format": "COMBO"}, []),
    "QVDLoadDiffusionModel": ({"unet_name": "COMBO"}, ["MODEL"]),
    "QVDReport": ({"model": "MODEL", "scales": "QVD_SCALES?", "filename_prefix": "STRING"}, []),
    "QVDCompare": (
        {"reference": "IMAGE", "test": "IMAGE", "amplify": "FLOAT"},
        ["IMAGE", "IMAGE", "FLOAT", "FLOAT"],
    ),
}


@pytest.fixture(autouse=True)
def folders(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(comfy.supported_models, "models", [models.WanConfig])
    monkeypatch.setattr(scale_cache, "_chosen_folder", None)
    monkeypatch.setenv("QVD_CACHE", str(comfyui / "cache"))
    scale_cache.register_folders()
    return comfyui


SPEC = QuantSpec(scale="smooth", range="minmax", temporal_quantizer="power")


def defaults(node: Any) -> dict[str, Any]:
    return {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}


def run(node: Any, **inputs: Any) -> io.NodeOutput:
    """As ComfyUI runs it: on a copy of the class that knows its id, in inference mode, widgets at their defaults."""
    copy = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}})
    with torch.inference_mode():
        output = copy.execute(**{**defaults(node), **inputs})
    assert isinstance(output, io.NodeOutput)
    if output.ui:
        json.dumps(output.ui)  # what the front end gets
        assert all(isinstance(value, (list, tuple)) for value in output.ui.values())
    return output


def calibrated(model: ModelPatcher, **inputs: Any) -> io.NodeOutput:
    common = {"negative": models.conditioning(4), "latent_image": models.latent(), "steps": 2, "settings": SPEC}
    return run(Calibrate, model=model, positive={"positive0": models.conditioning(2)}, **{**common, **inputs})


class TestSchemas:
    @pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
    def test_are_as_saved_workflows_know_them(self, node: Any) -> None:
        schema = node.GET_SCHEMA()
        inputs, outputs = SCHEMAS[schema.node_id]
        found = {i.id: i.get_io_type() + ("?" if i.optional else "") for i in schema.inputs}
        assert found == inputs and set(found) == set(inputs)
        assert [output.get_io_type() for output in schema.outputs] == outputs
        assert schema.category.split("/")[0] == "QVD" and schema.display_name.startswith("QVD ")
        assert schema.description

    def test_there_are_no_others(self) -> None:
        assert {node.GET_SCHEMA().node_id for node in NODES} == set(SCHEMAS)

    @pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
    def test_defaults_are_allowed_values(self, node: Any) -> None:
        for item in node.GET_SCHEMA().inputs:
            default = getattr(item, "default", None)
            if default is None:
                continue
            if isinstance(item, io.Combo.Input):
                assert default in item.options
            elif isinstance(item, (io.Int.Input, io.Float.Input)):
                assert item.min <= default <= item.max

    @pytest.mark.parametrize("node", [Calibrate, CalibrateTwoExperts])
    def test_a_run_does_not_change_the_seed(self, node: Any) -> None:
        """ComfyUI draws another one after each run for every widget of that name: it would calibrate again."""
        seed = next(i for i in node.GET_SCHEMA().inputs if i.id == "seed")
        assert seed.control_after_generate == io.ControlAfterGenerate.fixed

    @pytest.mark.parametrize("node", [QuantizeModel, Calibrate, CalibrateTwoExperts, LoadDiffusionModel])
    def test_what_is_shown_survives_the_cache(self, node: Any) -> None:
        schema = node.GET_SCHEMA()
        assert schema.has_intermediate_output and not schema.is_output_node

    def test_output_nodes(self) -> None:
        names = {node.GET_SCHEMA().node_id for node in NODES if node.GET_SCHEMA().is_output_node}
        assert names == {"QVDSaveScales", "QVDSaveCheckpoint", "QVDReport", "QVDCompare"}

    def test_prompts_grow(self) -> None:
        grown = next(i for i in Calibrate.GET_SCHEMA().inputs if i.id == "positive").template
        assert (grown.prefix, grown.min, grown.max) == ("positive", 1, 16)
        assert grown.input.get_io_type() == "CONDITIONING"

    def test_settings_are_those_of_the_core(self) -> None:
        schema = {i.id: i for i in QuantizeSettings.GET_SCHEMA().inputs}
        assert set(schema) == set(QuantSpec().to_dict())
        assert (schema["weight_bits"].min, schema["weight_bits"].max) == (BITS[0], BITS[-1])
        assert schema["buckets"].max == MOST_BUCKETS
        assert run(QuantizeSettings).args == (QuantSpec(),)

    def test_presets_are_those_of_the_core(self) -> None:
        options = [
            next(i for i in node.GET_SCHEMA().inputs if i.id == "preset").options
            for node in (QuantizeModel, Calibrate, CalibrateTwoExperts)
        ]
        assert options == [["auto", *PRESETS], list(PRESETS), list(PRESETS)]

    def test_samplers_are_comfyuis(self) -> None:
        schema = {i.id: i for i in Calibrate.GET_SCHEMA().inputs}
        assert schema["sampler_name"].options is samplers.KSampler.SAMPLERS
        assert schema["scheduler"].options is samplers.KSampler.SCHEDULERS


class TestQuantizeSettings:
    def test_every_widget_counts(self) -> None:
        values = {
            "weight_bits": 4,
            "activation_bits": 6,
            "activation": "static",
            "buckets": 3,
            "shift": False,
            "scale": "smooth",
            "range": "minmax",
            "rotate": True,
            "rounding": "gptq",
            "temporal": "online",
            "temporal_quantizer": "log2",
            "bias_correction": False,
            "portable": True,
            "backend": "reference",
        }
        spec = run(QuantizeSettings, auto_keep=0.25, modules_to_not_convert="blocks.0\n head,ffn ", **values)[0]
        expected = {**values, "auto_keep": 0.25, "modules_to_not_convert": ["blocks.0", "head", "ffn"]}
        assert spec.to_dict() == expected

    def test_a_wrong_value_is_said(self) -> None:
        with pytest.raises(QVDError, match="weight_bits must be an integer from 4 to 8"):
            run(QuantizeSettings, weight_bits=3)


class TestQuantizeModel:
    KEYS = {  # noqa: RUF012
        *("kind", "bits", "activation", "layers", "temporal", "of_layers", "kept", "float_bytes", "int8_bytes"),
        *("saved", "backend", "family", "calibrated", "warnings"),
    }

    def test_without_scales_it_takes_the_fast_preset(self, wan: ModelPatcher) -> None:
        output = run(QuantizeModel, model=wan)
        (quantized,), facts = output.args, output.ui["qvd"][0]
        assert record_of(quantized).spec == preset("fast") and set(facts) == self.KEYS
        assert (facts["kind"], facts["bits"], facts["activation"]) == ("model", "W8A8", "token")
        assert (facts["family"], facts["calibrated"], facts["temporal"]) == ("Wan", False, 1)
        assert facts["layers"] == len(quantized_layers(denoiser(quantized)))
        assert facts["layers"] + facts["kept"] == facts["of_layers"]
        assert facts["int8_bytes"] == sum(t.nbytes for t in denoiser(quantized).state_dict().values())
        assert facts["saved"] == pytest.approx(1 - facts["int8_bytes"] / facts["float_bytes"], abs=1e-4)
        assert "Wan: " in output.ui["text"][0] and "W8A8" in output.ui["text"][0]

    def test_auto_is_what_the_scales_are_for(self, wan: ModelPatcher, scales_for: Any) -> None:
        scales = scales_for(activation="static")
        output = run(QuantizeModel, model=wan, scales=scales)
        assert record_of(output[0]).spec == scales.spec
        assert (output.ui["qvd"][0]["activation"], output.ui["qvd"][0]["calibrated"]) == ("static", True)

    def test_settings_replace_the_preset(self, wan: ModelPatcher) -> None:
        spec = QuantSpec(weight_bits=4, temporal_quantizer="power")
        assert record_of(run(QuantizeModel, model=wan, preset="paper", settings=spec)[0]).spec == spec

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"preset": "best"}, "the preset best needs calibrated scales: connect QVD Calibrate"),
            ({"preset": "paper"}, "the preset paper needs calibrated scales"),
            ({"settings": QuantSpec(activation="static")}, "these settings need calibrated scales"),
            ({"settings": QuantSpec(auto_keep=0.1)}, "these settings need calibrated scales"),
            ({"settings": QuantSpec(rounding="gptq")}, "these settings need calibrated scales"),
        ],
    )
    def test_what_is_missing_is_said(self, wan: ModelPatcher, inputs: dict[str, Any], message: str) -> None:
        with pytest.raises(QVDError, match=message):
            run(QuantizeModel, model=wan, **inputs)

    def test_warnings_are_shown_where_the_user_looks(self, wan: ModelPatcher) -> None:
        spec = QuantSpec(modules_to_not_convert=("nothing",), temporal_quantizer="power")
        output = run(QuantizeModel, model=wan, settings=spec)
        assert any("no such layer" in line for line in output.ui["qvd"][0]["warnings"])
        assert "no such layer" in output.ui["text"][0]

    def test_an_unknown_model_is_quantized_by_the_generic_rule_and_says_so(self, convolutions: ModelPatcher) -> None:
        facts = run(QuantizeModel, model=convolutions).ui["qvd"][0]
        assert facts["family"] == "generic" and any("generic rule" in line for line in facts["warnings"])

    def test_an_image_model_is_quantized_and_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Flux(models.ConvolutionDenoiser):
            __module__ = "comfy.ldm.flux.model"

        monkeypatch.setattr(models.ConvolutionsConfig, "denoiser", Flux)
        facts = run(QuantizeModel, model=models.patcher(models.ConvolutionsConfig)).ui["qvd"][0]
        assert any("made for and measured on video models" in line for line in facts["warnings"])
        assert not any("generic rule" in line for line in facts["warnings"]) or facts["family"] == "generic image"

    def test_progress_is_shown(self, wan: ModelPatcher) -> None:
        shown: list[tuple[int, int]] = []
        comfy.utils.set_progress_bar_global_hook(
            lambda value, total, preview, node_id=None: shown.append((value, total))
        )
        layers = run(QuantizeModel, model=wan).ui["qvd"][0]["layers"]
        assert shown[-1] == (layers, layers) and len(shown) == layers + 1


class TestCalibrate:
    KEYS = {  # noqa: RUF012
        *("kind", "cache_hit", "seconds", "layers", "file", "warnings", "mean_sqnr_db", "worst"),
    }

    @pytest.fixture
    def wan(self) -> ModelPatcher:
        return models.patcher(models.OneBlockConfig)

    def test_scales_and_their_facts(self, wan: ModelPatcher) -> None:
        output = calibrated(wan)
        scales, facts = output[0], output.ui["qvd"][0]
        assert isinstance(scales, Scales) and scales.spec == SPEC
        assert set(facts) == self.KEYS and facts["kind"] == "scales" and not facts["cache_hit"]
        assert facts["layers"] == len(scales.layers) and facts["file"].endswith(".safetensors")
        decibels = [value for _, value in facts["worst"]]
        assert len(decibels) == min(10, len(scales.layers)) and decibels == sorted(decibels)
        assert facts["mean_sqnr_db"] >= decibels[0]
        assert "calibrated in" in output.ui["text"][0] and "mean SQNR" in output.ui["text"][0]
        again = calibrated(wan)
        assert again.ui["qvd"][0]["cache_hit"] and "loaded from the cache" in again.ui["text"][0]
        assert not calibrated(wan, use_cache=False).ui["qvd"][0]["cache_hit"]

    def test_a_preset_and_sigmas_of_ones_own(self, wan: ModelPatcher) -> None:
        scales = calibrated(wan, preset="fast", settings=None, sigmas=torch.tensor([1.0, 0.4, 0.0]))[0]
        assert scales.spec == preset("fast") and len(scales.calibrated_on["sampler"]["sigmas"]) == 3

    def test_several_prompts(self, wan: ModelPatcher) -> None:
        prompts = {f"positive{index}": models.conditioning(index) for index in range(3)}
        copy = Calibrate.PREPARE_CLASS_CLONE(None)
        values = {**defaults(Calibrate), "steps": 1, "settings": SPEC, "positive": prompts, "model": wan}
        with torch.inference_mode():
            output = copy.execute(negative=models.conditioning(4), latent_image=models.latent(), **values)
        assert output[0].calibrated_on["prompts"] == 3

    def test_two_experts(self, wan: ModelPatcher) -> None:
        output = run(
            CalibrateTwoExperts,
            model_high=wan,
            model_low=models.patcher(models.OneBlockConfig, seed=1),
            positive={"positive0": models.conditioning(2)},
            negative=models.conditioning(4),
            latent_image=models.latent(),
            steps=3,
            switch_step=1,
            cfg_low=1.0,
            settings=SPEC,
        )
        assert len(output.args) == len(output.ui["qvd"]) == 2
        assert [scales.calibrated_on["component"] for scales in output.args] == ["high", "low"]
        sampled = [scales.calibrated_on["sampler"] for scales in output.args]
        assert [(s["first_step"], s["last_step"], s["cfg"]) for s in sampled] == [(None, 1, 5.0), (1, None, 1.0)]

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"model": "text"}, "connect the MODEL output"),
            ({"positive": {}}, "no|empty|prompt"),
            ({"positive": {"positive0": []}}, "the positive 0 conditioning is empty"),
            ({"latent_image": {}}, "the latent is empty"),
        ],
    )
    def test_bad_input_is_said_in_plain_words(self, wan: ModelPatcher, inputs: dict[str, Any], message: str) -> None:
        common = {"negative": models.conditioning(4), "latent_image": models.latent(), "steps": 2, "preset": "fast"}
        values = {"model": wan, "positive": {"positive0": models.conditioning(2)}, **common, **inputs}
        with pytest.raises(QVDError, match=message):
            run(Calibrate, **values)


class TestFiles:
    def test_scales_there_and_back(self, scales_for: Any, folders: Path) -> None:
        scales = scales_for()
        output = run(SaveScales, scales=scales)
        assert output[0] is scales and "qvd_scales/scales_00001_.safetensors" in output.ui["text"][0]
        assert run(SaveScales, scales=scales).ui["text"][0].endswith("scales_00002_.safetensors")
        options = LoadScales.GET_SCHEMA().inputs[0].options
        assert options == ["scales_00001_.safetensors", "scales_00002_.safetensors"]
        loaded = run(LoadScales, scales_name=options[0])[0]
        assert loaded.report == scales.report and loaded.layers.keys() == scales.layers.keys()

    def test_scales_from_the_models_folder(self, scales_for: Any, folders: Path) -> None:
        scales_for().save(folders / "models" / "qvd_scales" / "sub" / "mine.safetensors")
        assert LoadScales.GET_SCHEMA().inputs[0].options == ["sub/mine.safetensors"]
        assert run(LoadScales, scales_name="sub/mine.safetensors")[0].layers

    @pytest.mark.parametrize("node", [LoadScales, LoadDiffusionModel])
    def test_a_name_from_outside_finds_nothing(self, node: Any, folders: Path) -> None:
        (folders / "secret.safetensors").write_bytes(b"x")
        name = "scales_name" if node is LoadScales else "unet_name"
        with pytest.raises((QVDError, FileNotFoundError), match="secret"):
            run(node, **{name: "../../secret.safetensors"})

    def test_a_changed_file_is_loaded_again(self, scales_for: Any) -> None:
        run(SaveScales, scales=scales_for())
        before = LoadScales.fingerprint_inputs(scales_name="scales_00001_.safetensors")
        assert before == LoadScales.fingerprint_inputs(scales_name="scales_00001_.safetensors")
        path = Path(folder_paths.get_full_path_or_raise("qvd_scales", "scales_00001_.safetensors"))
        path.write_bytes(path.read_bytes() + b" ")
        assert LoadScales.fingerprint_inputs(scales_name="scales_00001_.safetensors") != before
        assert LoadScales.fingerprint_inputs(scales_name="gone.safetensors") == "missing"

    def test_a_model_there_and_back(self, wan: ModelPatcher) -> None:
        quantized = run(QuantizeModel, model=wan)[0]
        output = run(SaveCheckpoint, model=quantized)
        assert not output.args and "diffusion_models/qvd_00001_.safetensors" in output.ui["text"][0]
        loaded = run(LoadDiffusionModel, unet_name="qvd_00001_.safetensors")
        assert torch.equal(models.sample(loaded[0]), models.sample(quantized))
        facts = loaded.ui["qvd"][0]
        assert set(facts) == TestQuantizeModel.KEYS and facts["family"] == "Wan" and facts["of_layers"] > 0
        assert LoadDiffusionModel.fingerprint_inputs(unet_name="qvd_00001_.safetensors") != "missing"

    def test_for_comfyui_without_qvd(self, wan: ModelPatcher, scales_for: Any) -> None:
        quantized = run(QuantizeModel, model=wan, scales=scales_for())[0]
        text = run(SaveCheckpoint, model=quantized, format=STOCK_FORMAT).ui["text"][0]
        assert text.startswith("saved ") and "portable=True" in text
        with pytest.raises(QVDError, match="load it with ComfyUI's own"):
            run(LoadDiffusionModel, unet_name="qvd_00001_.safetensors")

    def test_a_prefix_may_not_lead_out_of_the_output_folder(self, wan: ModelPatcher, folders: Path) -> None:
        quantized = run(QuantizeModel, model=wan)[0]
        with pytest.raises(Exception, match="outside"):
            run(SaveCheckpoint, model=quantized, filename_prefix="../../elsewhere", format=OWN_FORMAT)
        assert not list(folders.parent.glob("elsewhere*"))

    def test_a_float_model_is_refused(self, wan: ModelPatcher) -> None:
        with pytest.raises(QVDError, match="connect the output of QVD Quantize Model"):
            run(SaveCheckpoint, model=wan)


class TestReport:
    def test_three_files_and_the_data(self, wan: ModelPatcher, scales_for: Any, folders: Path) -> None:
        scales = scales_for()
        output = run(Report, model=run(QuantizeModel, model=wan, scales=scales)[0], scales=scales)
        assert not output.args and set(output.ui) == {"images", "qvd_report", "qvd_files"}
        named = [*output.ui["images"], *output.ui["qvd_files"]]
        paths = [folders / "output" / entry["subfolder"] / entry["filename"] for entry in named]
        assert [path.suffix for path in paths] == [".png", ".json", ".html"]
        assert all(path.is_file() and entry["type"] == "output" for path, entry in zip(paths, named, strict=True))
        assert output.ui["qvd_report"][0] == json.loads(paths[1].read_text(encoding="utf-8"))
        assert "blocks.0.ffn.0" in paths[1].read_text(encoding="utf-8")

    def test_without_scales_it_tells_what_the_model_remembers(self, wan: ModelPatcher, scales_for: Any) -> None:
        scales = scales_for()
        quantized = run(QuantizeModel, model=wan, scales=scales)[0]
        layers = {layer["name"]: layer for layer in run(Report, model=quantized).ui["qvd_report"][0]["layers"]}
        for name, figures in scales.report.items():
            if "sqnr_db" in figures:
                assert figures["sqnr_db"] in [pytest.approx(value, abs=0.01) for value in _numbers(layers[name])]

    def test_of_a_model_without_calibration(self, wan: ModelPatcher) -> None:
        assert run(Report, model=run(QuantizeModel, model=wan)[0]).ui["qvd_report"][0]

    def test_a_float_model_is_refused(self, wan: ModelPatcher) -> None:
        with pytest.raises(QVDError, match="connect the output of QVD Quantize Model"):
            run(Report, model=wan)


def _numbers(value: Any) -> list[float]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
    return own + [number for part in parts for number in _numbers(part)]


def video(frames: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(frames, 24, 32, channels, generator=torch.Generator().manual_seed(seed))


class TestCompare:
    def test_figures_and_pictures(self, folders: Path) -> None:
        reference = video(3)
        test = (reference + 0.01 * video(3, seed=1)).clamp(0, 1)
        output = run(Compare, reference=reference, test=test)
        joined, chart, psnr, ssim = output.args
        assert joined.shape[0] == 3 and joined.shape[3] == 3 and joined.shape[2] >= 3 * 32
        assert chart.shape[0] == 1 and chart.shape[3] == 3 and float(chart.max()) <= 1
        # Each frame's error is known: the mean of the decibels against 1.0.
        errors = [(r - t).double().square().mean() for r, t in zip(reference, test, strict=True)]
        decibels = [float(-10 * torch.log10(error)) for error in errors]
        data = output.ui["qvd_compare"][0]
        assert data["psnr"]["per_frame"] == pytest.approx(decibels, abs=0.05)
        assert data["psnr"]["min"] == pytest.approx(min(decibels), abs=0.05)
        assert psnr == pytest.approx(data["psnr"]["mean"]) and 0 < ssim <= 1
        assert (data["frames"], data["width"], data["height"], data["identical"]) == (3, 32, 24, False)
        for name in ("reference", "test", "difference"):
            assert len(data[name]) == 3 and all(entry["type"] == "temp" for entry in data[name])
            assert all((folders / "temp" / entry["filename"]).is_file() for entry in data[name])
        assert len(output.ui["images"]) == 2 and output.ui["text"][0]

    def test_identical_videos(self) -> None:
        output = run(Compare, reference=video(2), test=video(2))
        assert output[2] == 100.0 and output[3] == pytest.approx(1.0) and output.ui["qvd_compare"][0]["identical"]

    def test_transparency_is_left_out_and_long_videos_are_thinned(self) -> None:
        data = run(Compare, reference=video(70, channels=4), test=video(70, seed=1)).ui["qvd_compare"][0]
        shown = data["shown_frames"]
        assert len(shown) == len(data["test"]) == 64 and (shown[0], shown[-1]) == (0, 69)
        assert len(data["psnr"]["per_frame"]) == 70

    @pytest.mark.parametrize("test", [video(2), video(3)[:, :20], video(3)[:0]])
    def test_videos_of_other_sizes_are_refused(self, test: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"(?i)frame|size|shape"):
            run(Compare, reference=video(3), test=test)

    def test_a_full_disk_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(QVDError, match="No space left on device"):
            run(Compare, reference=video(1), test=video(1, seed=1))
