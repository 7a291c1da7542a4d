"""What a quantized model says about itself: its layers, its size, its way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from qvd_diffusers import QVDConfig, QVDError, calibrate
from tests.diffusers.tiny import PROMPTS, WAN_CALL


@pytest.fixture
def quantized(wan_folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", quantization_config=QVDConfig(modules_to_not_convert=["blocks.0.ffn"])
    )


def test_every_quantized_layer_says_how(quantized: WanTransformer3DModel) -> None:
    shown = repr(quantized)
    assert "(to_q): QuantLinear(32, 32, W8A8 token, plain, bias=True)" in shown
    assert "(time_proj): TemporalLinear(32, 192, W8, A8 codebook, table)" in shown
    assert "(proj_out): Linear(in_features=32, out_features=16, bias=True)" in shown


def test_the_config_says_what_differs_from_the_defaults(quantized: WanTransformer3DModel) -> None:
    shown = repr(quantized.config.quantization_config)
    assert "modules_to_not_convert=['blocks.0.ffn']" in shown and "<19 recorded layers>" in shown
    assert "weight_bits" not in shown


def test_the_memory_footprint_counts_the_codes_as_bytes(quantized: WanTransformer3DModel, wan_folder: Path) -> None:
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    stored = sum(tensor.nbytes for tensor in quantized.state_dict().values())
    # beside what is stored, diffusers counts the buffers that are computed when the model is built
    computed = full.get_memory_footprint() - sum(tensor.nbytes for tensor in full.state_dict().values())
    assert quantized.get_memory_footprint() == stored + computed
    assert quantized.num_parameters() == full.num_parameters()


def test_a_dequantized_model_is_an_ordinary_one(quantized: WanTransformer3DModel, wan_folder: Path) -> None:
    full = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    layer = quantized.blocks[1].ffn.net[2]
    model = quantized.dequantize()
    assert type(model.blocks[1].ffn.net[2]) is torch.nn.Linear and not model.is_quantized
    assert "quantization_config" not in model.config and model.get_memory_footprint() == full.get_memory_footprint()
    for name, tensor in full.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=float(layer.weight_scale.max()))


def test_a_model_that_drops_activations_is_not_calibrated(wan_pipe: WanPipeline) -> None:
    wan_pipe.transformer.blocks[0].attn1.to_out[1].p = 0.1
    wan_pipe.transformer.train()
    with pytest.raises(QVDError, match=r"training mode.*blocks.0.attn1.to_out.1 \(Dropout\).*evaluation mode"):
        calibrate(wan_pipe, PROMPTS[0], progress=False, **WAN_CALL)
    wan_pipe.transformer.eval()
    assert calibrate(wan_pipe, PROMPTS[0], progress=False, **WAN_CALL).layers


def test_a_model_with_an_adapter_is_neither_calibrated_nor_quantized(wan_pipe: WanPipeline) -> None:
    peft = pytest.importorskip("peft")
    wan_pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(QVDError, match=r"blocks.0.attn1.to_q .* holds an adapter \(LoRA\): unload it"):
        calibrate(wan_pipe, PROMPTS[0], progress=False, **WAN_CALL)
