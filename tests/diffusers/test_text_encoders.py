"""Quantized text encoders: every way in, the same after a reload, loud where transformers alone would go on."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, WanPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import UMT5EncoderModel

from qvd_core.layers import QuantLinear
from qvd_core.quality import sqnr_db
from qvd_diffusers import QVDConfig
from tests.diffusers.tiny import WAN_CALL, sample_frames
from tests.diffusers.tiny_encoders import ENCODERS, TOKENS, load, output, quantized_names, same_state, save_encoder

text_encoder = pytest.importorskip("qvd_diffusers.text_encoder", reason="transformers is too old", exc_type=ImportError)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `ENCODERS` in full precision. Read-only."""
    return functools.cache(lambda name: save_encoder(name, tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def umt5(encoder_folder: Callable[[str], Path]) -> Path:
    return encoder_folder("UMT5")


# Every kind of encoder


@pytest.mark.parametrize("name", ENCODERS)
def test_the_linears_of_the_blocks_are_quantized_and_nothing_else(
    name: str, encoder_folder: Callable[[str], Path]
) -> None:
    cls, blocks = type(ENCODERS[name][0]()), ENCODERS[name][1]
    model = cls.from_pretrained(encoder_folder(name), quantization_config=QVDConfig())
    names = quantized_names(model)
    assert len(names) == blocks
    assert not any(word in layer for layer in names for word in ("lm_head", "projection", "embed"))
    others = [tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in names]
    assert all(tensor.is_floating_point() for tensor in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_saved_loads_by_itself_and_computes_the_same(
    name: str, dtype: torch.dtype, encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = encoder_folder(name)
    cls = type(ENCODERS[name][0]())
    model = cls.from_pretrained(folder, dtype=dtype, quantization_config=QVDConfig())
    model.save_pretrained(tmp_path / "int8")
    again = cls.from_pretrained(tmp_path / "int8", dtype=dtype)
    assert same_state(model, again)
    assert model.dtype == again.dtype == dtype
    assert torch.equal(output(model), output(again))
    reference = output(cls.from_pretrained(folder, dtype=dtype))
    assert sqnr_db(reference.float(), output(model).float()) >= 25
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / part / "model.safetensors") for part in ("int8", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_codes_are_those_of_the_core(umt5: Path) -> None:
    full, model = UMT5EncoderModel.from_pretrained(umt5), load(umt5)
    for name in quantized_names(model):
        layer, weight = model.get_submodule(name), full.get_submodule(name).weight
        assert layer.weight.dtype == torch.int8 and not layer.weight.requires_grad
        assert layer.weight_scale.dtype == torch.float32
        torch.testing.assert_close(
            layer.dequantized_weight(), weight.data, rtol=0, atol=float(layer.weight_scale.max()) * 0.5001
        )


# What T5 keeps in float32


def test_wo_of_a_float16_t5_computes_in_float32(umt5: Path, tmp_path: Path) -> None:
    """Its sums leave the range of float16, which is why transformers keeps its weight in float32."""
    full = UMT5EncoderModel.from_pretrained(umt5)
    for block in full.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.data *= 3e5
    full.save_pretrained(tmp_path / "full")
    reference = UMT5EncoderModel.from_pretrained(tmp_path / "full", dtype=torch.float16)
    sums: list[float] = []
    reference.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_hook(
        lambda module, arguments, result: sums.append(float(result.abs().max()))
    )
    expected = output(reference)
    assert max(sums) > torch.finfo(torch.float16).max
    model = load(tmp_path / "full", dtype=torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.int8
    for each in (model, copy.deepcopy(model)):
        assert output(each).isfinite().all()
        assert sqnr_db(expected.float(), output(each).float()) >= 25


# Every way in


@pytest.mark.parametrize(
    "config",
    [
        QVDConfig(components=["transformer", "text_encoder"]),
        PipelineQuantizationConfig(quant_mapping={"transformer": QVDConfig(), "text_encoder": QVDConfig()}),
        PipelineQuantizationConfig(
            quant_backend="qvd",
            quant_kwargs={"weight_bits": 8},
            components_to_quantize=["transformer", "text_encoder"],
        ),
    ],
    ids=["components", "quant_mapping", "quant_backend"],
)
def test_a_pipeline_with_its_text_encoder_saves_and_loads(wan_folder: Path, tmp_path: Path, config: Any) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=config)
    assert quantized_names(pipe.text_encoder) and quantized_names(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    assert same_state(pipe.text_encoder, again.text_encoder)
    assert same_state(pipe.transformer, again.transformer)
    reference = sample_frames(DiffusionPipeline.from_pretrained(wan_folder), WAN_CALL)
    error = (sample_frames(again, WAN_CALL) - reference).square().mean().sqrt()
    assert 0 < error < 0.05 * reference.std()


def test_only_the_denoisers_are_quantized_unless_an_encoder_is_named(wan_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig())
    assert quantized_names(pipe.transformer) and not quantized_names(pipe.text_encoder)


def test_calibrated_settings_of_a_pipeline_are_for_its_denoisers(wan_folder: Path) -> None:
    config = QVDConfig(components=["text_encoder"], scales="never-read.safetensors", activation="static")
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=config)
    layer = pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q
    assert isinstance(layer, QuantLinear) and layer.activation_scale is None
    assert config.activation == "static"


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_maps_work(umt5: Path, device_map: Any) -> None:
    assert same_state(load(umt5), load(umt5, device_map=device_map))


def test_shards_in_and_out(umt5: Path, tmp_path: Path) -> None:
    UMT5EncoderModel.from_pretrained(umt5).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model = load(tmp_path / "shards")
    model.save_pretrained(tmp_path / "int8", max_shard_size="10KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 1
    again = UMT5EncoderModel.from_pretrained(tmp_path / "int8")
    assert same_state(load(umt5), model) and same_state(model, again)


def test_layers_can_be_left_in_full_precision(umt5: Path, tmp_path: Path) -> None:
    model = load(umt5, QVDConfig(modules_to_not_convert=["encoder.block.0"]))
    assert quantized_names(model) and not any(name.startswith("encoder.block.0.") for name in quantized_names(model))
    model.save_pretrained(tmp_path)
    assert same_state(model, UMT5EncoderModel.from_pretrained(tmp_path))


def test_one_layer_at_a_time_is_in_full_precision(umt5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is quantized, those before it are int8 already and those after it have not been read."""
    seen: list[int] = []
    original = text_encoder.QVDTextQuantizer.encode

    def encode(self: Any, name: str, weight: torch.Tensor, model: nn.Module) -> Any:
        layers = [model.get_submodule(layer) for layer in quantized_names(model)]
        assert all(layer.weight.dtype == torch.int8 or layer.weight.is_meta for layer in layers)
        seen.append(sum(not layer.weight.is_meta for layer in layers))
        return original(self, name, weight, model)

    monkeypatch.setattr(text_encoder.QVDTextQuantizer, "encode", encode)
    load(umt5)
    assert seen == list(range(14))


# After loading


def test_dequantized_it_is_an_ordinary_model_again(umt5: Path, tmp_path: Path) -> None:
    model = load(umt5)
    quantized = output(model)
    model.dequantize()
    assert not quantized_names(model)
    assert sqnr_db(quantized, output(model)) >= 25
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same_state(model, UMT5EncoderModel.from_pretrained(tmp_path))


def test_it_takes_less_memory(umt5: Path) -> None:
    full, model = UMT5EncoderModel.from_pretrained(umt5), load(umt5)
    kept = sum(tensor.nbytes for name, tensor in model.named_parameters() if tensor.is_floating_point())
    assert model.get_memory_footprint() < kept + 0.35 * (full.get_memory_footprint() - kept)


def test_it_compiles_without_a_break(umt5: Path) -> None:
    model = load(umt5)
    expected = output(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS)[0], expected)


def test_the_users_config_is_not_touched(umt5: Path) -> None:
    config = QVDConfig()
    load(umt5, config)
    assert config == QVDConfig() and config.layers is None


# Without `import qvd_diffusers`

_PLAIN_LOAD = """
import sys
from transformers import UMT5EncoderModel
UMT5EncoderModel.from_pretrained(sys.argv[1])
"""


def test_without_the_import_loading_fails_instead_of_computing_with_codes(umt5: Path, tmp_path: Path) -> None:
    load(umt5).save_pretrained(tmp_path)
    plain = subprocess.run([sys.executable, "-c", _PLAIN_LOAD, tmp_path], capture_output=True, text=True, check=False)
    assert plain.returncode == 1
    assert "Unknown quantization type, got qvd" in plain.stderr
    assert "RuntimeError" in plain.stderr.splitlines()[-1]
