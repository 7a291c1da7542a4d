"""What cannot be saved, dequantized or merged as it stands says so, instead of writing or computing something else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from qvd_core.layers import QuantizedLayer
from qvd_diffusers import QVDConfig, QVDError, calibrate, quantize
from tests.diffusers.tiny import PROMPTS, WAN_CALL, group_offload

SAVING_ASKS = hasattr(diffusers.quantizers.base.DiffusersQuantizer, "get_state_dict_and_metadata")


@pytest.fixture
def model(wan_folder: Path) -> Any:
    return WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", quantization_config=QVDConfig(temporal="none")
    )


def to_disk(model: Any, folder: Path) -> None:
    group_offload(model, offload_type="leaf_level", offload_to_disk_path=str(folder))


def cast(model: Any, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def adapted(model: Any, folder: Path) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def fused(model: Any, folder: Path) -> None:
    adapted(model, folder)
    model.fuse_lora()


@pytest.mark.parametrize("state", [to_disk, cast, lambda model, _: accelerate.cpu_offload(model, "cpu"), fused])
def test_dequantizing_is_refused_before_anything_changes(model: Any, state: Any, tmp_path: Path) -> None:
    state(model, tmp_path)
    before = sum(isinstance(module, QuantizedLayer) for module in model.modules())
    with pytest.raises(QVDError, match=r"dequantiz"):
        model.dequantize()
    assert sum(isinstance(module, QuantizedLayer) for module in model.modules()) == before


@pytest.mark.skipif(not SAVING_ASKS, reason="this diffusers does not ask the quantizer when it saves")
@pytest.mark.parametrize(("state", "message"), [(adapted, "adapter"), (fused, "adapter"), (cast, "layerwise casting")])
def test_what_could_not_be_loaded_is_not_saved(model: Any, state: Any, message: str, tmp_path: Path) -> None:
    state(model, tmp_path / "hooks")
    with pytest.raises(QVDError, match=message):
        model.save_pretrained(tmp_path / "out")


def test_a_fused_adapter_can_be_saved_once_it_is_unloaded(model: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(model.blocks[0].attn1.to_q.weight.data)
    fused(model, tmp_path)
    model.unload_lora()
    model.save_pretrained(tmp_path / "out")
    weight = WanTransformer3DModel.from_pretrained(tmp_path / "out").blocks[0].attn1.to_q.weight
    assert torch.equal(weight, model.blocks[0].attn1.to_q.weight) and not torch.equal(weight, plain)


def test_scales_of_one_expert_are_refused_for_a_twin(wan22_folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan22_folder)
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)  # no difference that weights could show
    pipe.save_pretrained(tmp_path)
    scales = calibrate(pipe, PROMPTS[0], cache=False, progress=False, **WAN_CALL)
    swapped = {"transformer": scales["transformer_2"], "transformer_2": scales["transformer"]}
    for wrong in (swapped, scales["transformer"]):
        with pytest.raises(QVDError, match=r"calibrated on transformer.* not on transformer"):
            DiffusionPipeline.from_pretrained(tmp_path, quantization_config=QVDConfig(scales=wrong))
        with pytest.raises(QVDError, match=r"calibrated on transformer.* not on transformer"):
            quantize(DiffusionPipeline.from_pretrained(tmp_path), QVDConfig(scales=wrong))
    assert DiffusionPipeline.from_pretrained(tmp_path, quantization_config=QVDConfig(scales=scales))


def test_weights_of_another_model_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig(backend="weight_only"))
    (source,) = (wan_folder / "transformer").glob("*.safetensors")
    state = load_file(source)
    name = "blocks.0.attn1.to_q.weight"
    save_file({**state, name: 2 * state[name]}, tmp_path / "weights.safetensors")
    with pytest.raises(QVDError, match=f"{name} in .* is not what this WanTransformer3DModel was quantized from"):
        calibrate(pipe, PROMPTS[0], weights=tmp_path / "weights.safetensors", cache=False, progress=False, **WAN_CALL)


def test_scales_show_themselves_in_one_line(wan_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder)
    config = QVDConfig(activation="static")
    scales = calibrate(pipe, PROMPTS[0], config=config, cache=False, progress=False, **WAN_CALL)
    shown = "Scales(WanTransformer3DModel: 20 layers, 1 temporal projections; activation='static')"
    assert repr(scales) == shown


def test_a_pipeline_without_a_denoiser_is_refused(wan_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder)
    pipe.register_modules(transformer=None)
    with pytest.raises(QVDError, match="has no denoiser"):
        quantize(pipe)
