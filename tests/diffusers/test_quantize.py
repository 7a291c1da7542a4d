"""`quantize`: what is in memory becomes what loading with a config gives, and saves like it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLWan,
    DiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn

from qvd_core import quantize_model
from qvd_diffusers import QuantSpec, QVDConfig, QVDError, Scales, calibrate, quantize
from tests.diffusers.tiny import (
    ANIMATE_CALL,
    PROMPTS,
    WAN_CALL,
    sample_frames,
    tiny_animate_diff,
    tiny_wan_transformer,
)


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def expert_scales(wan22_folder: Path) -> dict[str, Scales]:
    pipe = DiffusionPipeline.from_pretrained(wan22_folder)
    found: dict[str, Scales] = calibrate(pipe, PROMPTS[:1], cache=False, progress=False, **WAN_CALL)
    return found


def test_a_model_becomes_what_loading_gives(wan_folder: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    assert quantize(model) is model
    loaded = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", quantization_config=QVDConfig())
    assert_same_state(model, loaded)
    assert model.hf_quantizer.quantization_config == loaded.hf_quantizer.quantization_config
    assert model.quantization_method == loaded.quantization_method and model.is_quantized
    model.save_pretrained(tmp_path)
    assert_same_state(model, WanTransformer3DModel.from_pretrained(tmp_path))


def test_a_model_that_was_never_saved(tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_config(tiny_wan_transformer().config).to(torch.bfloat16)
    quantize(model, QVDConfig(weight_bits=4)).save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.hf_quantizer.quantization_config.weight_bits == 4
    quantized = {name for name, tensor in again.state_dict().items() if not tensor.is_floating_point()}
    assert quantized
    for name in quantized:
        assert torch.equal(model.state_dict()[name], again.state_dict()[name])


def test_a_pipeline_saves_and_loads_by_itself(wan_pipe: WanPipeline, tmp_path: Path) -> None:
    reference = sample_frames(wan_pipe, WAN_CALL)
    assert quantize(wan_pipe) is wan_pipe
    assert wan_pipe.text_encoder.dtype == torch.float32
    wan_pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert_same_state(wan_pipe.transformer, again.transformer)
    error = (sample_frames(again, WAN_CALL) - reference).square().mean().sqrt()
    assert 0 < error < 0.03 * reference.std()


def test_layers_that_a_class_keeps_in_float32_are_saved_as_they_load(tmp_path: Path) -> None:
    """One layer of another type than the rest: config.json records one compute type."""
    model = tiny_wan_transformer().to(torch.bfloat16)
    model.blocks[0].ffn.net[2].float()
    quantize(model)
    assert model.blocks[0].ffn.net[2].bias.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(again.blocks[0].ffn.net[2].bias, model.blocks[0].ffn.net[2].bias)
    assert again.blocks[0].ffn.net[2].compute_dtype == model.blocks[0].ffn.net[2].compute_dtype


def test_each_expert_gets_its_own_scales(wan22_folder: Path, expert_scales: dict[str, Scales], tmp_path: Path) -> None:
    config = QVDConfig(scales=expert_scales, activation="static")
    pipe = quantize(DiffusionPipeline.from_pretrained(wan22_folder), config)
    loaded = DiffusionPipeline.from_pretrained(wan22_folder, quantization_config=config)
    for name in ("transformer", "transformer_2"):
        assert_same_state(getattr(pipe, name), getattr(loaded, name))
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "transformer_2"):
        assert_same_state(getattr(pipe, name), getattr(again, name))


def test_components_chooses_one_expert(wan22_folder: Path) -> None:
    pipe = quantize(DiffusionPipeline.from_pretrained(wan22_folder), QVDConfig(components=["transformer_2"]))
    assert not getattr(pipe.transformer, "is_quantized", False)
    assert pipe.transformer_2.is_quantized
    assert pipe.transformer_2.config.quantization_config.components is None


def test_the_users_config_is_not_touched(wan_pipe: WanPipeline) -> None:
    config = QVDConfig(components=["transformer"])
    quantize(wan_pipe, config)
    assert config == QVDConfig(components=["transformer"])


def test_dequantizing_gives_a_float_model_that_can_be_quantized_again(wan_pipe: WanPipeline) -> None:
    model = quantize(wan_pipe.transformer)
    codes = model.blocks[0].attn1.to_q.weight.clone()
    model.dequantize()
    assert "quantization_config" not in model.config
    quantize(model)
    assert torch.equal(model.blocks[0].attn1.to_q.weight, codes)


# AnimateDiff: an image UNet and a motion adapter are joined when the pipeline is made


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AnimateDiff pipeline as people have it: a Stable Diffusion folder with a `UNet2DConditionModel`."""
    pipe = tiny_animate_diff()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    folder = tmp_path_factory.mktemp("image")
    unet.save_pretrained(folder / "unet")
    pipe.save_pretrained(folder / "video")
    index = folder / "video" / "model_index.json"
    index.write_text(index.read_text().replace("UNetMotionModel", "UNet2DConditionModel"))
    for path in (folder / "video" / "unet").iterdir():
        path.unlink()
    unet.save_pretrained(folder / "video" / "unet")
    return folder / "video"


def motion_adapter() -> Any:
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=(16, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )


def test_an_image_unet_points_to_quantize(image_folder: Path) -> None:
    with pytest.raises(QVDError, match=r"AnimateDiff.*qvd_diffusers\.quantize\(pipe"):
        AnimateDiffPipeline.from_pretrained(
            image_folder, motion_adapter=motion_adapter(), quantization_config=QVDConfig()
        )


def test_an_image_unet_with_a_motion_adapter_is_quantized_in_memory(image_folder: Path, tmp_path: Path) -> None:
    pipe = AnimateDiffPipeline.from_pretrained(image_folder, motion_adapter=motion_adapter())
    reference = sample_frames(pipe, ANIMATE_CALL)
    quantize(pipe)
    quantized = sample_frames(pipe, ANIMATE_CALL)
    error = (quantized - reference).square().mean().sqrt()
    assert 0 < error < 0.05 * reference.std()
    pipe.save_pretrained(tmp_path)
    assert_same_state(pipe.unet, DiffusionPipeline.from_pretrained(tmp_path).unet)


# Refused, and untouched


def test_when_one_expert_cannot_be_quantized_neither_is(wan22_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan22_folder)
    with torch.no_grad():
        pipe.transformer_2.blocks[1].ffn.net[2].weight[0, 0] = float("nan")
    before = state_of(pipe.transformer)
    with pytest.raises(QVDError, match=r"blocks\.1\.ffn\.net\.2\.weight holds NaN"):
        quantize(pipe)
    assert untouched(pipe.transformer, before)
    assert "quantization_config" not in pipe.transformer.config


def test_nan_outside_the_quantized_layers_is_found_too(wan_pipe: WanPipeline) -> None:
    with torch.no_grad():
        wan_pipe.transformer.proj_out.bias[0] = float("inf")
    before = state_of(wan_pipe.transformer)
    with pytest.raises(QVDError, match=r"proj_out\.bias holds NaN or infinity"):
        quantize(wan_pipe)
    assert untouched(wan_pipe.transformer, before)


def meta_model() -> WanTransformer3DModel:
    with torch.device("meta"):
        return tiny_wan_transformer()


def with_adapter() -> WanTransformer3DModel:
    from peft import LoraConfig

    model = tiny_wan_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return model


def cast_layer_by_layer() -> WanTransformer3DModel:
    model = tiny_wan_transformer()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return model


def offloaded_by_groups() -> WanTransformer3DModel:
    model = tiny_wan_transformer()
    try:
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this diffusers cannot offload groups without an accelerator")
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "quantized by quantize": (lambda: quantize(tiny_wan_transformer()), "is quantized already, by qvd"),
    "quantized by the core": (lambda: quantize_model(tiny_wan_transformer()), "is quantized already"),
    "empty": (meta_model, "not in memory: quantize before enabling offloading"),
    "adapter": (with_adapter, "holds an adapter"),
    "layerwise casting": (cast_layer_by_layer, "quantized already|layerwise casting"),
    "group offload": (offloaded_by_groups, "has group offloading enabled: quantize it first"),
    "compiled": (lambda: torch.compile(tiny_wan_transformer(), backend="eager"), "is compiled: quantize it first"),
    "no diffusers model": (lambda: nn.Linear(64, 64), r"qvd_core\.quantize_model"),
    "autoencoder": (lambda: AutoencoderKLWan(base_dim=8, z_dim=4), "AutoencoderKLWan is not a video denoiser"),
    "double precision": (lambda: tiny_wan_transformer().double(), "is torch.float64: convert it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantized_is_refused_in_one_sentence(case: str) -> None:
    build, message = REFUSED[case]
    model = build()
    with pytest.raises(QVDError, match=message):
        quantize(model)


def test_a_text_encoder_is_refused(wan_pipe: WanPipeline) -> None:
    before = state_of(wan_pipe.transformer)
    for target, config in (
        (wan_pipe.text_encoder, QVDConfig()),
        (wan_pipe, QVDConfig(components=["transformer", "text_encoder"])),
    ):
        with pytest.raises(QVDError, match="transformers model"):
            quantize(target, config)
    assert untouched(wan_pipe.transformer, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QVDConfig(components=["unet"]), "WanPipeline has no model 'unet'"),
        (QVDConfig(activation="static"), "needs calibrated scales"),
        (QVDConfig(compute_dtype="bfloat16"), r"call \.to\(dtype\) before quantizing"),
        (QuantSpec(), "config must be a QVDConfig, got QuantSpec"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(wan_pipe: WanPipeline, config: Any, message: str) -> None:
    before = state_of(wan_pipe.transformer)
    with pytest.raises(QVDError, match=message):
        quantize(wan_pipe, config)
    assert untouched(wan_pipe.transformer, before)


def test_scales_of_the_other_expert_are_refused(wan22_folder: Path, expert_scales: dict[str, Scales]) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan22_folder)
    swapped = {"transformer": expert_scales["transformer_2"], "transformer_2": expert_scales["transformer"]}
    before = state_of(pipe.transformer)
    with pytest.raises(QVDError):
        quantize(pipe, QVDConfig(scales=swapped))
    with pytest.raises(QVDError, match="are for the components"):
        quantize(pipe.transformer, QVDConfig(scales=expert_scales))
    assert untouched(pipe.transformer, before)


def test_a_quantized_model_can_be_copied(wan_pipe: WanPipeline) -> None:
    model = quantize(wan_pipe.transformer)
    assert_same_state(model, copy.deepcopy(model))
