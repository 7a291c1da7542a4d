"""Every way in which diffusers takes a quantization config leads to the same int8 model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, WanTransformer3DModel
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn

from qvd_core.layers import QuantizedLayer, QuantLinear
from qvd_diffusers import QVDConfig, QVDError
from tests.diffusers.tiny import ANIMATE_CALL, WAN_CALL, sample_frames


def from_pipeline(folder: Path, config: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, quantization_config=config).transformer


def from_model(folder: Path, config: Any, kind: Any = WanTransformer3DModel) -> Any:
    return kind.from_pretrained(str(folder), subfolder="transformer", quantization_config=config)


def backend_by_name() -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(
        quant_backend="qvd", quant_kwargs={"weight_bits": 8}, components_to_quantize=["transformer"]
    )


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


@pytest.mark.parametrize(
    "config",
    [
        QVDConfig(components=["transformer", "text_encoder"]),
        PipelineQuantizationConfig(quant_mapping={"text_encoder": QVDConfig()}),
        PipelineQuantizationConfig(
            quant_backend="qvd", quant_kwargs={"weight_bits": 8}, components_to_quantize=["text_encoder"]
        ),
    ],
    ids=["components", "quant_mapping", "quant_backend"],
)
def test_a_text_encoder_is_refused_in_one_sentence(wan_folder: Path, config: Any) -> None:
    with pytest.raises(QVDError, match="is a transformers model, and QVD quantizes only the denoiser"):
        DiffusionPipeline.from_pretrained(wan_folder, quantization_config=config)
