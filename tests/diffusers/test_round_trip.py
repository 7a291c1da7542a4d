"""Saving and loading: a quantized model is an ordinary diffusers folder that needs no config to load."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from qvd_core import quantize_model
from qvd_core.checkpoint import plan_of
from qvd_diffusers import QVDConfig, Scales, calibrate, quantize
from qvd_diffusers.streaming import Encoder
from tests.diffusers.tiny import ANIMATE_CALL, PROMPTS, WAN_CALL, sample_frames


def assert_same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


def quantized(folder: Path, **arguments: Any) -> Any:
    config = arguments.pop("config", QVDConfig())
    return WanTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=config, **arguments
    )


@pytest.fixture(scope="session")
def wan_scales(wan_folder: Path) -> Scales:
    return calibrate(DiffusionPipeline.from_pretrained(wan_folder), PROMPTS, cache=False, progress=False, **WAN_CALL)


def test_a_saved_pipeline_loads_by_itself(wan_folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig())
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert_same_state(pipe.transformer, again.transformer)
    torch.testing.assert_close(sample_frames(again, WAN_CALL), sample_frames(pipe, WAN_CALL), rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"activation": "static"}, {"scale": "none", "shift": False}], ids=str)
def test_a_calibrated_model_survives_the_trip(
    wan_folder: Path, wan_scales: Scales, tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = wan_scales.save(tmp_path / "scales.safetensors")
    model = quantized(wan_folder, config=QVDConfig(scales=path, **settings))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "scales.safetensors").unlink()
    again = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert_same_state(model, again)
    assert str(path) not in (tmp_path / "saved" / "config.json").read_text()
    assert again.hf_quantizer.quantization_config.spec == QVDConfig(**settings).spec


STEPPED = {
    "W4-bucket": {"weight_bits": 4, "activation": "static_bucket"},
    "W4-data-free": {"weight_bits": 4},
    "W5A6-frame-rotation": {"weight_bits": 5, "activation_bits": 6, "activation": "static_frame", "rotate": True},
    "portable-gptq": {"portable": True, "rounding": "gptq", "activation": "static"},
    "auto-keep": {"auto_keep": 0.2, "activation": "static_bucket"},
}


@pytest.mark.parametrize("settings", STEPPED.values(), ids=STEPPED)
def test_every_way_of_quantizing_makes_the_trip(
    wan_pipe: WanPipeline, wan_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Loaded through diffusers it is the model that quantizing in place gives, and it is saved and loaded as it is."""
    config, scales = QVDConfig(**settings, scale="smooth", temporal_quantizer="power"), None
    if settings != {"weight_bits": 4}:
        scales = calibrate(wan_pipe, PROMPTS[:1], config=config, cache=False, progress=False, **WAN_CALL)
        config = replace(config, scales=scales)
    model = quantized(wan_folder, config=config)
    assert_same_state(model, quantize_model(copy.deepcopy(wan_pipe.transformer), config.spec, scales))
    model.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert_same_state(model, again)
    assert plan_of(model) == plan_of(again)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, again(**inputs).sample)


def test_calibrated_scales_are_used(wan_folder: Path, wan_scales: Scales) -> None:
    layer = quantized(wan_folder, config=QVDConfig(scales=wan_scales)).blocks[0].ffn.net[2]
    assert torch.equal(layer.input_shift, wan_scales.layers["blocks.0.ffn.net.2"].input_shift)
    assert quantized(wan_folder).blocks[0].ffn.net[2].input_shift is None


def test_an_animatediff_pipeline_makes_the_trip(animate_folder: Path, tmp_path: Path) -> None:
    full = DiffusionPipeline.from_pretrained(animate_folder)
    scales = calibrate(full, PROMPTS[:1], progress=False, **ANIMATE_CALL)
    pipe = DiffusionPipeline.from_pretrained(animate_folder, quantization_config=QVDConfig(scales=scales))
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert_same_state(pipe.unet, again.unet)
    kinds = {entry[0] for entry in pipe.unet.hf_quantizer.quantization_config.layers.values()}
    assert kinds == {"linear", "conv2d", "temporal"}
    reference = sample_frames(full, ANIMATE_CALL)
    error = (sample_frames(again, ANIMATE_CALL) - reference).square().mean().sqrt()
    assert 0 < error < 0.03 * reference.std()


def test_saving_again_writes_the_same_files(wan_folder: Path, tmp_path: Path) -> None:
    quantized(wan_folder).save_pretrained(tmp_path / "first")
    WanTransformer3DModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        folder / "diffusion_pytorch_model.safetensors" for folder in (tmp_path / "first", tmp_path / "second")
    )
    assert first.read_bytes() == second.read_bytes()
    entries = [json.loads((path.parent / "config.json").read_text())["quantization_config"] for path in (first, second)]
    assert entries[0] == entries[1]


def test_shards_make_no_difference(wan_folder: Path, tmp_path: Path) -> None:
    whole = quantized(wan_folder)
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    full.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 3
    from_shards = WanTransformer3DModel.from_pretrained(tmp_path / "full", quantization_config=QVDConfig())
    assert_same_state(whole, from_shards)
    whole.save_pretrained(tmp_path / "int8", max_shard_size="10KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 3
    assert_same_state(whole, WanTransformer3DModel.from_pretrained(tmp_path / "int8"))


def test_a_weight_and_its_bias_may_come_in_different_shards(wan_folder: Path, tmp_path: Path) -> None:
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    full.save_pretrained(tmp_path, max_shard_size="6KB")
    where = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    apart = [
        name for name in where if name.endswith(".weight") and where.get(name[:-6] + "bias", where[name]) != where[name]
    ]
    assert any(name.startswith("blocks") for name in apart)
    model = WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=QVDConfig())
    assert_same_state(model, quantized(wan_folder))


def test_the_full_precision_model_is_never_there_as_a_whole(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    add = Encoder.add

    def spy(encoder: Encoder, *tensor: Any) -> Any:
        encoded = add(encoder, *tensor)
        waiting.append(len(encoder.waiting))
        return encoded

    monkeypatch.setattr(Encoder, "add", spy)
    quantized(wan_folder)
    assert max(waiting) == 1 and waiting[-1] == 0


def test_parallel_loading_makes_no_difference(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    full.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "1")
    assert_same_state(
        WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=QVDConfig()), quantized(wan_folder)
    )


@pytest.mark.parametrize(
    "saving",
    [{"variant": "fp16"}, {"safe_serialization": False}, {"variant": "fp16", "max_shard_size": "20KB"}],
    ids=str,
)
def test_the_kind_of_file_makes_no_difference(wan_folder: Path, tmp_path: Path, saving: dict[str, Any]) -> None:
    """A variant, or PyTorch's own format: for the float weights and for the quantized ones."""
    loading = {"variant": saving["variant"]} if "variant" in saving else {}
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", torch_dtype=torch.float16)
    full.save_pretrained(tmp_path / "full", **saving)
    model = WanTransformer3DModel.from_pretrained(
        tmp_path / "full", torch_dtype=torch.float16, quantization_config=QVDConfig(), **loading
    )
    assert_same_state(model, quantize(full))
    model.save_pretrained(tmp_path / "int8", **saving)
    again = WanTransformer3DModel.from_pretrained(tmp_path / "int8", **loading)
    assert again.dtype == torch.float16
    assert_same_state(model, again)


def test_bfloat16_makes_the_trip(wan_folder: Path, tmp_path: Path) -> None:
    model = quantized(wan_folder, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.attn1.to_q.weight_scale"].dtype == torch.float32
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16  # recorded: nobody has to know it
    assert_same_state(model, again)
    wider = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert wider.dtype == torch.float32


def test_a_config_given_for_a_quantized_checkpoint_is_ignored_with_a_warning(wan_folder: Path, tmp_path: Path) -> None:
    model = quantized(wan_folder)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        again = WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=QVDConfig(weight_bits=4))
    assert_same_state(model, again)
    assert again.hf_quantizer.quantization_config.weight_bits == 8


def test_dequantizing_gives_a_float_model_that_saves_as_one(
    wan_folder: Path, wan_scales: Scales, tmp_path: Path
) -> None:
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    model = quantized(wan_folder, config=QVDConfig(scales=wan_scales))
    model.dequantize()
    assert "quantization_config" not in model.config
    model.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert all(type(again.get_submodule(name)) is type(module) for name, module in full.named_modules())
    weight = full.blocks[0].ffn.net[2].weight
    error = (again.blocks[0].ffn.net[2].weight - weight).norm() / weight.norm()
    assert error < 0.01


def test_loaded_tensors_do_not_depend_on_where_they_stood_in_the_file(wan_folder: Path, tmp_path: Path) -> None:
    """A view into the mapped file keeps its odd alignment, and float32 kernels then round otherwise."""
    model = quantized(wan_folder)
    model.save_pretrained(tmp_path)
    for loaded in (model, WanTransformer3DModel.from_pretrained(tmp_path)):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.state_dict().values())


def test_a_loaded_model_can_be_copied_and_pickled(wan_folder: Path) -> None:
    model = quantized(wan_folder)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert_same_state(model, twin)
        assert twin.hf_quantizer.quantization_config.layers == model.hf_quantizer.quantization_config.layers
