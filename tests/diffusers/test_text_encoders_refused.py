"""Quantized text encoders: what does not go, in one clear error each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, UMT5EncoderModel

from qvd_core.spec import QuantSpec
from qvd_diffusers import QVDConfig, QVDError
from tests.diffusers.tiny_encoders import SIZES, WORDS, load, save_encoder

text_encoder = pytest.importorskip("qvd_diffusers.text_encoder", reason="transformers is too old", exc_type=ImportError)


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a full-precision UMT5 encoder. Read-only."""
    return save_encoder("UMT5", tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def saved(umt5: Path, tmp_path: Path) -> Path:
    """The folder of a quantized UMT5 encoder."""
    load(umt5).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": "scales.safetensors"}, "scales needs calibration, which text encoders have none of"),
        ({"activation": "static"}, 'activation="static" needs calibration'),
        ({"rounding": "gptq"}, 'rounding="gptq" needs calibration'),
        ({"auto_keep": 0.1}, "auto_keep=0.1 needs calibration"),
        ({"weight_bits": 4}, "weight_bits=4 is not supported for text encoders"),
    ],
)
def test_settings_that_need_calibration_are_refused(umt5: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QVDError, match=message):
        load(umt5, QVDConfig(**settings))


def test_scales_by_component_with_an_encoder_among_them_are_refused(wan_folder: Path) -> None:
    config = QVDConfig(components=["text_encoder"], scales={"text_encoder": "scales.safetensors"})
    with pytest.raises(QVDError, match="scales are given for text_encoder, a text encoder"):
        DiffusionPipeline.from_pretrained(wan_folder, quantization_config=config)


def test_a_float_checkpoint_with_nan_is_refused(umt5: Path, tmp_path: Path) -> None:
    model = UMT5EncoderModel.from_pretrained(umt5)
    model.encoder.block[1].layer[0].SelfAttention.k.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(QVDError, match=r"encoder\.block\.1\.layer\.0\.SelfAttention\.k\.weight holds NaN"):
        load(tmp_path)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights file in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


Q = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file.pop(f"{Q}.weight"), rf"lacks {Q}\.weight"),
        (lambda file: file.pop(f"{Q}.weight_scale"), rf"lacks {Q}\.weight_scale"),
        (lambda file: file[f"{Q}.weight_scale"].fill_(-1), rf"{Q}\.weight_scale must be positive"),
        (lambda file: file.update({f"{Q}.weight": file[f"{Q}.weight"].float()}), rf"{Q}\.weight is float32"),
        (
            lambda file: file.update({f"{Q}.weight": file[f"{Q}.weight"][:, :1].clone()}),
            rf"{Q}\.weight is int8 \[1, 32",
        ),
        (
            lambda file: file.update({f"{Q}.weight_scale": torch.ones(32, 1, dtype=torch.int8)}),
            rf"{Q}\.weight_scale is I8 in the checkpoint",
        ),
        (lambda file: file.update({"other.weight_scale": torch.ones(1, 1)}), "holds other.weight_scale, which config"),
    ],
    ids=["no weight", "no scale", "negative scale", "float weight", "other shape", "int8 scale", "extra scale"],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(saved: Path, edit: Any, message: str) -> None:
    change(saved, edit)
    with pytest.raises(QVDError, match=message):
        UMT5EncoderModel.from_pretrained(saved)


def test_a_float_checkpoint_without_a_weight_is_refused(umt5: Path, tmp_path: Path) -> None:
    UMT5EncoderModel.from_pretrained(umt5).save_pretrained(tmp_path)
    change(tmp_path, lambda file: file.pop(f"{Q}.weight"))
    with pytest.raises(QVDError, match=rf"lacks {Q}\.weight"):
        load(tmp_path)


def test_a_quantized_checkpoint_is_not_quantized_again(saved: Path) -> None:
    entry = json.loads((saved / "config.json").read_text())
    del entry["quantization_config"]
    (saved / "config.json").write_text(json.dumps(entry))
    with pytest.raises(QVDError, match="as I8: it is quantized already"):
        load(saved)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "records no layers"),
        ({Q: ["linear"], "encoder.block.7.layer.0.SelfAttention.q": ["linear"]}, "this UMT5EncoderModel has not"),
        ({Q: ["temporal"]}, "in a form that text encoders do not have"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(saved: Path, layers: Any, message: str) -> None:
    entry = json.loads((saved / "config.json").read_text())
    entry["quantization_config"]["layers"] = entry["quantization_config"]["layers"] | layers if layers else None
    (saved / "config.json").write_text(json.dumps(entry))
    with pytest.raises(QVDError, match=message):
        UMT5EncoderModel.from_pretrained(saved)


def test_layers_to_disk_are_refused(umt5: Path, tmp_path: Path) -> None:
    with pytest.raises(QVDError, match="to disk"):
        load(umt5, device_map={"shared": "cpu", "encoder": "disk"}, offload_folder=tmp_path)


def test_a_dtype_without_kernels_is_refused(umt5: Path) -> None:
    with pytest.raises(QVDError, match="dtype must be one of float32, bfloat16, float16"):
        load(umt5, dtype=torch.float64)


def test_an_encoder_without_linears_in_blocks_is_refused(tmp_path: Path) -> None:
    """GPT-2 multiplies with a class of its own."""
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=1, n_head=2, n_positions=8)
    GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(QVDError, match="GPT2Model has no linear layer in repeated blocks"):
        GPT2Model.from_pretrained(tmp_path, quantization_config=QVDConfig())


def test_the_pooler_of_bert_is_outside_its_blocks() -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(vocab_size=WORDS, **SIZES))
    plan = text_encoder.plan_text_layers(model, QuantSpec())
    assert len(plan) == 12 and all(layer.tensors == ("bias",) for layer in plan.values())
    assert "pooler.dense" not in plan
