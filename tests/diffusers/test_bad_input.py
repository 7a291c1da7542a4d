"""Bad input: one clear error each, and nothing half-changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file

from qvd_diffusers import QVDConfig, QVDError, Scales, calibrate
from qvd_diffusers.samples import check_call
from tests.diffusers.tiny import PROMPTS, WAN_CALL, tiny_wan_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def int8_folder(wan_folder: Path, tmp_path: Path) -> Path:
    """A quantized transformer's folder of one's own."""
    folder = tmp_path / "int8"
    quantize(wan_folder / "transformer").save_pretrained(folder)
    return folder


def quantize(folder: Path, **settings: Any) -> Any:
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=QVDConfig(**settings))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a saved model."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


# Models that are not for QVD


def test_an_autoencoder_is_no_video_denoiser(wan_folder: Path) -> None:
    with pytest.raises(QVDError, match="AutoencoderKLWan is not a video denoiser"):
        AutoencoderKLWan.from_pretrained(wan_folder, subfolder="vae", quantization_config=QVDConfig())


def tiny_image_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
    )


def test_an_image_pipeline_is_refused(animate_folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextModel

    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(animate_folder, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(animate_folder / "text_encoder"),
        tokenizer=None,
        unet=tiny_image_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with pytest.raises(QVDError, match="UNet2DConditionModel is not a video denoiser"):
        calibrate(pipe, PROMPTS, progress=False)


def test_a_model_of_another_backend_is_not_calibrated(wan_pipe: WanPipeline) -> None:
    # some backends swap kernels and keep float tensors: only the config tells
    wan_pipe.transformer.register_to_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(QVDError, match="quantized already, by bitsandbytes"):
        calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)


def test_a_quantized_pipeline_is_not_calibrated(wan_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig())
    with pytest.raises(QVDError, match="quantized already, by qvd"):
        calibrate(pipe, PROMPTS, progress=False, **WAN_CALL)


def test_codes_of_another_backend_are_not_taken_for_weights(wan_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wan_folder / "transformer", tmp_path / "other")
    name = "blocks.0.attn1.to_q.weight"
    edit(folder, lambda tensors: tensors.update({name: (tensors[name] * 100).to(torch.int8)}))
    with pytest.raises(QVDError, match=r"to_q\.weight is torch\.int8: this checkpoint is quantized already"):
        quantize(folder)


# Weights


@pytest.mark.parametrize("name", ["blocks.1.ffn.net.2.weight", "blocks.0.attn1.to_q.bias", "proj_out.weight"])
def test_nan_in_a_weight_is_named(name: str, wan_folder: Path, tmp_path: Path, wan_pipe: WanPipeline) -> None:
    folder = shutil.copytree(wan_folder / "transformer", tmp_path / "nan")
    edit(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(QVDError, match=f"{name} holds NaN"):
        quantize(folder)
    wan_pipe.transformer = WanTransformer3DModel.from_pretrained(folder)
    with pytest.raises(QVDError, match=f"{name} holds NaN"):
        calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)


def test_nan_while_sampling_is_an_error(wan_pipe: WanPipeline, own_cache: Path) -> None:
    with torch.no_grad():
        wan_pipe.transformer.blocks[0].ffn.net[0].proj.weight.fill_(3e38)
    with pytest.raises(QVDError, match="NaN or infinity during calibration"):
        calibrate(wan_pipe, PROMPTS[:1], progress=False, **WAN_CALL)
    assert not own_cache.exists()


@pytest.mark.parametrize("name", ["blocks.1.ffn.net.2.weight", "blocks.0.attn1.to_q.bias", "proj_out.weight"])
def test_a_missing_float_tensor_is_named(name: str, wan_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wan_folder / "transformer", tmp_path / "short")
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(QVDError, match=f"lacks {name}"):
        quantize(folder)


# Quantized checkpoints


@pytest.mark.parametrize("name", ["blocks.1.ffn.net.2.weight_scale", "condition_embedder.time_proj.levels"])
def test_a_missing_quantized_tensor_is_named(name: str, int8_folder: Path) -> None:
    edit(int8_folder, lambda tensors: tensors.pop(name))
    with pytest.raises(QVDError, match=f"lacks {name}"):
        WanTransformer3DModel.from_pretrained(int8_folder)


def test_a_tensor_that_the_config_does_not_know_is_named(int8_folder: Path) -> None:
    edit(int8_folder, lambda tensors: tensors.update({"proj_out.weight_scale": torch.ones(16, 1)}))
    with pytest.raises(QVDError, match=r"holds proj_out\.weight_scale, which config\.json does not plan"):
        WanTransformer3DModel.from_pretrained(int8_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.half(), "is float16 .* expected float32"),
        (lambda tensor: tensor * float("nan"), "holds NaN"),
        (lambda tensor: tensor * 0, "must be positive"),
        (lambda tensor: tensor[:-1].clone(), r"is float32 \[31, 1\] .* expected float32 \[32, 1\]"),
    ],
)
def test_a_scale_that_cannot_be_right_is_refused(change: Any, message: str, int8_folder: Path) -> None:
    name = "blocks.0.attn1.to_q.weight_scale"
    edit(int8_folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(QVDError, match=f"{name} {message}"):
        WanTransformer3DModel.from_pretrained(int8_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "newer QVD"),
        ({"layers": None}, "records no layers"),
        ({"layers": {"blocks.9.attn1.to_q": ["linear"]}}, "blocks.9.attn1.to_q"),
        ({"layers": {"blocks.0.attn1.to_q": ["ternary"]}}, "damaged,? or from a newer QVD"),
    ],
)
def test_a_broken_config_is_refused(change: dict[str, Any], message: str, int8_folder: Path) -> None:
    path = int8_folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(QVDError, match=message):
        WanTransformer3DModel.from_pretrained(int8_folder)


def test_a_quantized_single_file_points_to_from_pretrained(int8_folder: Path, wan_folder: Path) -> None:
    with pytest.raises(QVDError, match="from_pretrained"):
        WanTransformer3DModel.from_single_file(
            str(int8_folder / WEIGHTS), config=str(wan_folder / "transformer"), quantization_config=QVDConfig()
        )


# Scales


@pytest.fixture(scope="module")
def scales(wan_folder: Path) -> Scales:
    pipe = WanPipeline.from_pretrained(wan_folder)
    return calibrate(pipe, PROMPTS[:1], cache=False, progress=False, **WAN_CALL)


def test_a_missing_scales_file_is_named(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QVDError, match=r"nowhere\.safetensors does not exist"):
        quantize(wan_folder / "transformer", scales=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("length", [0, 100, -100])
def test_a_truncated_scales_file_is_refused(length: int, scales: Scales, wan_folder: Path, tmp_path: Path) -> None:
    path = scales.save(tmp_path / "scales.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(QVDError, match="damaged"):
        quantize(wan_folder / "transformer", scales=path)


def test_scales_of_another_architecture_are_refused(scales: Scales, tmp_path: Path) -> None:
    config = dict(tiny_wan_transformer().config)
    config["num_layers"] = 1
    WanTransformer3DModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(QVDError, match="calibrated on another model"):
        quantize(tmp_path, scales=scales)


def test_scales_of_other_weights_are_refused(scales: Scales, tmp_path: Path) -> None:
    tiny_wan_transformer(seed=1).save_pretrained(tmp_path)
    with pytest.raises(QVDError, match="calibrated on another WanTransformer3DModel"):
        quantize(tmp_path, scales=scales)


def test_static_activations_need_scales(wan_folder: Path) -> None:
    with pytest.raises(QVDError, match="needs calibrated scales"):
        quantize(wan_folder / "transformer", activation="static")


# Calls of `calibrate`


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "no prompts"),
        (["a seven", "  "], {}, r"prompts\[1\] is empty"),
        ("", {}, r"prompts\[0\] is empty"),
        ([7], {}, r"prompts\[0\] must be a string"),
        (None, {}, "prompts must be a list"),
        (PROMPTS, {"hight": 16}, "takes no argument 'hight'"),
        (PROMPTS, {"generator": None}, "'generator' follows from prompts and seed"),
        (PROMPTS, {"seed": "one"}, "seed must be an integer"),
        (PROMPTS, {"config": {"weight_bits": 8}}, "config must be a QVDConfig"),
        (PROMPTS, {"component": "unet"}, "has no model 'unet'; it has .*transformer"),
        (PROMPTS, {"component": "vae"}, "AutoencoderKLWan is not a video denoiser"),
        (lambda pipe: None, {}, "never called the model"),
        (lambda pipe: None, {"height": 16}, "'height' have nowhere to go"),
    ],
)
def test_a_wrong_call_is_explained(
    prompts: Any, arguments: dict[str, Any], message: str, wan_pipe: WanPipeline, own_cache: Path
) -> None:
    with pytest.raises(QVDError, match=message):
        calibrate(wan_pipe, prompts, progress=False, **arguments)
    assert not own_cache.exists()
    assert not wan_pipe.transformer._forward_pre_hooks
    assert not hasattr(wan_pipe, "_progress_bar_config")


def test_a_pipeline_without_prompts_wants_a_function() -> None:
    class FromImage:
        def __call__(self, image: Any) -> None: ...

    with pytest.raises(QVDError, match="FromImage takes no prompt: pass a function"):
        check_call(FromImage(), {"image": None})


def test_only_a_pipeline_can_be_calibrated(wan_pipe: WanPipeline) -> None:
    with pytest.raises(QVDError, match="expected a diffusers pipeline, got WanTransformer3DModel"):
        calibrate(wan_pipe.transformer, PROMPTS)


def test_a_pipeline_without_denoiser_is_refused(wan_pipe: WanPipeline) -> None:
    wan_pipe.transformer = None
    with pytest.raises(QVDError, match="has no denoiser"):
        calibrate(wan_pipe, PROMPTS)


@pytest.mark.parametrize("name", ["blocks.1.attn1.norm_q.weight", "blocks.0.attn1.to_q.weight_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_quantized_checkpoint_is_refused(wan_folder: Path, tmp_path: Path, name: str, value: float) -> None:
    quantize(wan_folder / "transformer").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(QVDError, match=f"{name} holds NaN or infinity"):
        WanTransformer3DModel.from_pretrained(tmp_path)


def test_float8_weights_are_another_quantization(wan_folder: Path, tmp_path: Path, wan_pipe: WanPipeline) -> None:
    name = "blocks.0.attn1.to_q.weight"
    folder = shutil.copytree(wan_folder / "transformer", tmp_path / "fp8")
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(QVDError, match=f"{name} is torch.float8_e4m3fn.*quantized already"):
        quantize(folder)
    layer = wan_pipe.transformer.blocks[0].attn1.to_q
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(QVDError, match="quantized already"):
        calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)


def test_a_misspelt_layer_to_keep_is_said(wan_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", quantization_config=QVDConfig(modules_to_not_convert=["blocks.9"])
    )
    assert "'blocks.9'" in caplog.text
