"""Quantized text encoders: every way in, the same after a reload, loud where transformers alone would go on."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, WanPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from qvd_core.layers import QuantLinear
from qvd_core.quality import sqnr_db
from qvd_core.spec import QuantSpec
from qvd_diffusers import QVDConfig, QVDError
from tests.diffusers.tiny import WAN_CALL, sample_frames

pytest.importorskip("transformers.core_model_loading", reason="quantized text encoders need transformers 5")
text_encoder = pytest.importorskip("qvd_diffusers.text_encoder")

WORDS = 64
TOKENS = torch.randint(3, WORDS, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
CLIP_TOKENS = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}

ENCODERS: dict[str, tuple[Callable[[], Any], int]] = {
    # name: (a tiny random encoder, the number of linears in its blocks)
    "T5": (lambda: T5EncoderModel(T5Config(**T5_SIZES)), 14),
    "UMT5": (lambda: UMT5EncoderModel(UMT5Config(**T5_SIZES)), 14),
    "CLIP text": (
        lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_TOKENS, **SIZES, projection_dim=16)),
        12,
    ),
    "CLIP vision": (
        lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16)
        ),
        12,
    ),
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **SIZES)), 14),
    "Qwen2": (lambda: Qwen2Model(Qwen2Config(vocab_size=WORDS, num_key_value_heads=2, **SIZES)), 14),
}


def output(model: Any) -> torch.Tensor:
    """The first output [B, ..., C] for fixed tokens, or a fixed image."""
    images = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16).to(model.dtype)
    with torch.no_grad():
        first = model(images if model.main_input_name == "pixel_values" else TOKENS)[0]
    assert isinstance(first, torch.Tensor)
    return first


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `ENCODERS` in full precision. Read-only."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("encoder")
            torch.manual_seed(0)
            ENCODERS[name][0]().save_pretrained(folders[name])
        return folders[name]

    return folder


@pytest.fixture
def umt5(encoder_folder: Callable[[str], Path]) -> Path:
    return encoder_folder("UMT5")


@pytest.fixture
def saved(umt5: Path, tmp_path: Path) -> Path:
    """The folder of a quantized UMT5 encoder."""
    load(umt5).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def load(folder: Path, config: QVDConfig | None = None, **keywords: Any) -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(folder, quantization_config=config or QVDConfig(), **keywords)


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
    seen: list[list[str]] = []
    original = text_encoder.QVDTextQuantizer.encode

    def encode(self: Any, name: str, weight: torch.Tensor, model: nn.Module) -> Any:
        layers = [model.get_submodule(layer) for layer in quantized_names(model)]
        assert all(layer.weight.dtype == torch.int8 for layer in layers)
        seen.append([str(layer.weight.device) for layer in layers])
        return original(self, name, weight, model)

    monkeypatch.setattr(text_encoder.QVDTextQuantizer, "encode", encode)
    load(umt5)
    assert [devices.count("cpu") for devices in seen] == list(range(14))


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


def test_without_the_import_loading_fails_instead_of_computing_with_codes(saved: Path) -> None:
    plain = subprocess.run([sys.executable, "-c", _PLAIN_LOAD, saved], capture_output=True, text=True, check=False)
    assert plain.returncode == 1
    assert "Unknown quantization type, got qvd" in plain.stderr
    assert "RuntimeError" in plain.stderr.splitlines()[-1]


# Bad input


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
