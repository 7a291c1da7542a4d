"""`QVDConfig`: one class for every place where diffusers asks for a quantization config."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from qvd_core.spec import QuantSpec
from qvd_diffusers import QVDConfig, QVDError, Scales, register
from qvd_diffusers.config import SPEC_FIELDS


def test_it_is_what_every_level_of_diffusers_asks_for() -> None:
    config = QVDConfig()
    assert isinstance(config, PipelineQuantizationConfig)
    assert isinstance(config, QuantizationConfigMixin)
    assert config.quant_method.value == "qvd"


def test_it_has_every_setting_of_the_core_with_the_same_default() -> None:
    assert QVDConfig().spec == QuantSpec()
    assert {field.name for field in dataclasses.fields(QVDConfig)} >= set(SPEC_FIELDS)


def test_a_dict_of_it_is_json_and_gives_it_back() -> None:
    config = QVDConfig(weight_bits=6, modules_to_not_convert=["proj_out"], compute_dtype=torch.bfloat16)
    entry = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    assert QVDConfig.from_dict(entry) == config
    assert entry["quant_method"] == "qvd"


@pytest.mark.parametrize("scales", ["secret/scales.safetensors", Scales("Model", "0", QuantSpec())])
def test_scales_are_never_written(scales: Any) -> None:
    config = QVDConfig(scales=scales)
    assert "scales" not in config.to_dict()
    assert "secret" not in json.dumps(config.to_dict())


def test_what_it_prints_is_what_was_chosen() -> None:
    assert repr(QVDConfig()) == "QVDConfig()"
    assert repr(QVDConfig(weight_bits=4, scales="s.safetensors")) == "QVDConfig(weight_bits=4, scales='s.safetensors')"


def test_the_users_lists_are_copied() -> None:
    names = ["proj_out"]
    config = QVDConfig(modules_to_not_convert=names, components=names)
    names.append("blocks")
    assert config.spec.modules_to_not_convert == ("proj_out",)
    assert config.components_to_quantize == ["proj_out"]


def test_every_component_gets_a_config_of_its_own() -> None:
    config = QVDConfig(components=["transformer", "transformer_2"])
    copies = [config._resolve_quant_config(is_diffusers=True, module_name=name) for name in config.components or ()]
    assert copies[0] is not copies[1]
    assert copies[0] == copies[1] == config
    assert config._resolve_quant_config(is_diffusers=True, module_name="vae") is None


def test_presets_start_from_a_recipe_and_take_changes() -> None:
    assert QVDConfig.paper().activation == "static_frame" and QVDConfig.paper().temporal_quantizer == "log2"
    assert QVDConfig.paper(weight_bits=4).weight_bits == 4
    assert not QVDConfig.fast().spec.transforms_inputs
    assert QVDConfig.best().spec == QuantSpec(rotate=True, rounding="gptq")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 3}, "weight_bits must be"),
        ({"activation": "sometimes"}, "activation must be one of"),
        ({"scales": "auto"}, "qvd_diffusers.calibrate"),
        ({"scales": 7}, "scales must be"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of"),
        ({"components": []}, "components must be"),
        ({"modules_to_not_convert": "proj_out"}, "modules_to_not_convert must be"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QVDError, match=message):
        QVDConfig(**settings)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": 99}, "newer QVD"),
        ({"version": "1"}, "damaged"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"weight_bit": 4}, "unknown setting.*weight_bit"),
        ({"layers": ["blocks"]}, "damaged"),
    ],
)
def test_an_entry_that_cannot_be_understood_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(QVDError, match=message):
        QVDConfig.from_dict({"quant_method": "qvd", **entry})


def test_notes_and_settings_that_are_off_do_no_harm() -> None:
    assert QVDConfig.from_dict({"_comment": "made in Delft", "future_feature": False, "other": None}) == QVDConfig()


def test_registering_again_changes_nothing() -> None:
    from diffusers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
