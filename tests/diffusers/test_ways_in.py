"""Every way in which diffusers takes a quantization config leads to the same int8 model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn

from qvd_core.layers import QuantizedLayer, QuantLinear
from qvd_diffusers import QVDConfig, QVDError, Scales, calibrate, quantize
from tests.diffusers.tiny import ANIMATE_CALL, PROMPTS, WAN_CALL, sample_frames


def from_pipeline(folder: Path, config: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, quantization_config=config).transformer


def from_model(folder: Path, config: Any, kind: Any = WanTransformer3DModel, **arguments: Any) -> Any:
    return kind.from_pretrained(str(folder), subfolder="transformer", quantization_config=config, **arguments)


def backend_by_name() -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(
        quant_backend="qvd", quant_kwargs={"weight_bits": 8}, components_to_quantize=["transformer"]
    )


def from_modular_pipeline(folder: Path) -> Any:
    """`load_components` gives a plain config to every component, and a dict to those it names."""
    modular = pytest.importorskip("diffusers").ModularPipeline
    try:
        pipe = modular.from_pretrained(str(folder))
    except RuntimeError as error:  # diffusers 0.36 beside transformers 5
        pytest.skip(f"this diffusers cannot import its pipelines here: {str(error).splitlines()[-1]}")
    if "transformer" not in getattr(pipe, "_component_specs", {}):
        pytest.skip("this diffusers has no modular pipeline for Wan")
    pipe.load_components(names=["transformer", "vae"], quantization_config={"transformer": QVDConfig()})
    assert pipe.vae is not None
    return pipe.transformer


def from_memory(folder: Path) -> Any:
    return quantize(WanTransformer3DModel.from_pretrained(str(folder), subfolder="transformer"))


WAYS: dict[str, Callable[[Path], Any]] = {
    "pipeline": lambda folder: from_pipeline(folder, QVDConfig()),
    "pipeline, named component": lambda folder: from_pipeline(folder, QVDConfig(components=["transformer"])),
    "quant_mapping": lambda folder: from_pipeline(
        folder, PipelineQuantizationConfig(quant_mapping={"transformer": QVDConfig()})
    ),
    "quant_backend": lambda folder: from_pipeline(folder, backend_by_name()),
    "model": lambda folder: from_model(folder, QVDConfig()),
    "AutoModel": lambda folder: from_model(folder, QVDConfig(), AutoModel),
    "dict": lambda folder: from_model(folder, {"quant_method": "qvd"}),
    "modular pipeline": from_modular_pipeline,
    "quantize": from_memory,
}


@pytest.fixture(scope="module")
def expected(wan_folder: Path) -> dict[str, torch.Tensor]:
    model: nn.Module = from_model(wan_folder, QVDConfig())
    return model.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_gives_the_same_int8_model(way: str, wan_folder: Path, expected: dict[str, torch.Tensor]) -> None:
    model = WAYS[way](wan_folder)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert state["blocks.0.ffn.net.2.weight"].dtype == torch.int8
    assert model.quantization_method.value == "qvd"


def test_the_layers_hold_int8_codes_and_take_about_a_quarter(wan_folder: Path) -> None:
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    model = from_model(wan_folder, QVDConfig())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    assert len(layers) == 21  # ten linears in each of two blocks, and the projection of the timestep
    for name, layer in layers.items():
        reference = full.get_submodule(name).weight
        assert layer.weight.dtype == torch.int8 and not layer.weight.requires_grad
        assert layer.weight_scale.dtype == torch.float32
        assert layer.weight.nbytes * 4 == reference.nbytes
        torch.testing.assert_close(layer.dequantized_weight(), reference, rtol=0, atol=float(layer.weight_scale.max()))
    assert isinstance(layers["blocks.0.attn1.to_q"], QuantLinear)
    assert type(model.proj_out) is nn.Linear


@pytest.mark.parametrize(("pipeline", "call"), [("wan", WAN_CALL), ("animate", ANIMATE_CALL)])
def test_a_quantized_pipeline_samples_what_the_full_one_samples(
    pipeline: str, call: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{pipeline}_folder")
    reference = sample_frames(DiffusionPipeline.from_pretrained(folder), call)
    quantized = sample_frames(DiffusionPipeline.from_pretrained(folder, quantization_config=QVDConfig()), call)
    error = (quantized - reference).square().mean().sqrt()
    assert 0 < error < 0.03 * reference.std()


def test_the_other_components_stay_as_they_are(wan_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig())
    for part in (pipe.vae, pipe.text_encoder):
        assert all(parameter.is_floating_point() for parameter in part.parameters())


def test_the_users_config_is_not_touched(wan_folder: Path) -> None:
    config = QVDConfig(modules_to_not_convert=["blocks.0"])
    model = from_model(wan_folder, config)
    assert config == QVDConfig(modules_to_not_convert=["blocks.0"])
    assert config.layers is None
    assert not any(name.startswith("blocks.0") for name in model.hf_quantizer.quantization_config.layers)


def test_bfloat16_keeps_the_scales_in_float32(wan_folder: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", torch_dtype=torch.bfloat16, quantization_config=QVDConfig()
    )
    exact = from_model(wan_folder, QVDConfig())
    assert model.dtype == torch.bfloat16
    layer, reference = model.blocks[0].attn1.to_q, exact.blocks[0].attn1.to_q
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, reference.weight_scale)  # from the stored float32 weight, never rounded
    assert torch.equal(layer.weight, reference.weight)
    # what a model class keeps in float32 stays there
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert model.scale_shift_table.dtype == torch.float32


def test_compute_dtype_counts_when_torch_dtype_is_not_given(wan_folder: Path) -> None:
    assert from_model(wan_folder, QVDConfig(compute_dtype="bfloat16")).dtype == torch.bfloat16
    assert from_model(wan_folder, QVDConfig()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_dtype_decides_the_compute_type(dtype: torch.dtype, wan_folder: Path) -> None:
    config = QVDConfig(compute_dtype="float32")
    by_argument = DiffusionPipeline.from_pretrained(wan_folder, torch_dtype=dtype, quantization_config=config)
    assert by_argument.transformer.dtype == by_argument.vae.dtype == dtype
    by_component = DiffusionPipeline.from_pretrained(
        wan_folder, torch_dtype={"transformer": dtype, "default": torch.float32}, quantization_config=config
    )
    assert (by_component.transformer.dtype, by_component.vae.dtype) == (dtype, torch.float32)


def test_low_cpu_mem_usage_cannot_be_switched_off(wan_folder: Path) -> None:
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False or None when using quantization"):
        from_model(wan_folder, QVDConfig(), low_cpu_mem_usage=False)


@pytest.mark.parametrize("device_map", ["balanced", "cpu"])
def test_device_maps_of_a_pipeline_work(wan_folder: Path, device_map: str, expected: dict[str, torch.Tensor]) -> None:
    if device_map not in SUPPORTED_DEVICE_MAP:
        pytest.skip(f"this diffusers has no device_map={device_map!r} for pipelines")
    if device_map == "balanced" and not torch.cuda.is_available():
        pytest.skip("device_map='balanced' needs an accelerator")
    pipe = DiffusionPipeline.from_pretrained(wan_folder, device_map=device_map, quantization_config=QVDConfig())
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_work(wan_folder: Path, device_map: Any, expected: dict[str, torch.Tensor]) -> None:
    model = WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", device_map=device_map, quantization_config=QVDConfig()
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_single_full_precision_file_is_quantized_while_it_is_read(
    wan_folder: Path, expected: dict[str, torch.Tensor]
) -> None:
    folder = wan_folder / "transformer"
    model = WanTransformer3DModel.from_single_file(
        str(folder / "diffusion_pytorch_model.safetensors"), config=str(folder), quantization_config=QVDConfig()
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.hf_quantizer.quantization_config.layers


def test_layers_to_disk_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QVDError, match="disk"):
        WanTransformer3DModel.from_pretrained(
            wan_folder,
            subfolder="transformer",
            device_map={"": "cpu", "blocks": "disk"},
            offload_folder=tmp_path,
            quantization_config=QVDConfig(),
        )


# The backend by its name, for every component


def all_by_name(**settings: Any) -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(quant_backend="qvd", quant_kwargs={"weight_bits": 8, **settings})


def test_the_backend_by_name_leaves_the_autoencoder_as_it_is(
    wan_folder: Path, tmp_path: Path, expected: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qvd_diffusers"):
        pipe = from_pipeline_folder(wan_folder, all_by_name(compute_dtype="bfloat16"))
    assert "AutoencoderKLWan is no video denoiser: QVD leaves it in full precision" in caplog.text
    assert pipe.transformer.dtype == torch.bfloat16
    codes = [name for name, tensor in expected.items() if not tensor.is_floating_point()]
    assert all(torch.equal(pipe.transformer.state_dict()[name], expected[name]) for name in codes)
    plain = DiffusionPipeline.from_pretrained(wan_folder).vae
    for name, tensor in plain.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], tensor) and pipe.vae.state_dict()[name].dtype == tensor.dtype
    pipe.vae.to(torch.float16)  # what diffusers forbids for a quantized model
    assert "quantization_config" not in pipe.vae.config and not pipe.vae.is_quantized
    pipe.vae.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert type(pipe.vae).from_pretrained(tmp_path).dtype == torch.float32


def from_pipeline_folder(folder: Path, config: Any, **arguments: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, quantization_config=config, **arguments)


def test_torch_dtype_reaches_what_is_left_in_full_precision(wan_folder: Path) -> None:
    pipe = from_pipeline_folder(wan_folder, all_by_name(), torch_dtype=torch.bfloat16)
    plain = DiffusionPipeline.from_pretrained(wan_folder, torch_dtype=torch.bfloat16).vae
    for name, tensor in plain.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], tensor)


def test_a_config_that_is_read_is_the_one_that_users_write() -> None:
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    assert type(DiffusersAutoQuantizer.from_dict({"quant_method": "qvd"})) is QVDConfig


# Two experts


@pytest.fixture(scope="module")
def expert_scales(wan22_folder: Path) -> dict[str, Scales]:
    pipe = DiffusionPipeline.from_pretrained(wan22_folder)
    found: dict[str, Scales] = calibrate(pipe, PROMPTS[:1], cache=False, progress=False, **WAN_CALL)
    return found


def by_mapping(scales: dict[str, Scales]) -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(quant_mapping={name: QVDConfig(scales=own) for name, own in scales.items()})


EXPERTS: dict[str, Callable[[Path, dict[str, Scales]], Any]] = {
    "pipeline": lambda folder, scales: from_pipeline_folder(folder, QVDConfig(scales=scales)),
    "quant_mapping": lambda folder, scales: from_pipeline_folder(folder, by_mapping(scales)),
    "quantize": lambda folder, scales: quantize(DiffusionPipeline.from_pretrained(folder), QVDConfig(scales=scales)),
}


@pytest.mark.parametrize("way", EXPERTS)
def test_every_way_in_gives_each_expert_its_own_scales(
    way: str, wan22_folder: Path, expert_scales: dict[str, Scales], tmp_path: Path
) -> None:
    pipe = EXPERTS[way](wan22_folder, expert_scales)
    for name in ("transformer", "transformer_2"):
        shift = getattr(pipe, name).blocks[0].ffn.net[2].input_shift
        assert torch.equal(shift, expert_scales[name].layers["blocks.0.ffn.net.2"].input_shift)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "transformer_2"):
        before, after = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
