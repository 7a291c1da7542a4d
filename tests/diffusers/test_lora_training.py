"""Training an adapter on a frozen int8 model, with the code of docs/lora.md."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from peft import get_peft_model_state_dict

from qvd_diffusers import QVDConfig
from tests.diffusers.adapters import cosine, noise, same, sqnr_db, tensors, wan

GUIDE = Path(__file__).parents[2] / "docs" / "lora.md"
STEPS = 10


@pytest.fixture(scope="module")
def train_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """The function of the guide."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "def " in block)
    path = tmp_path_factory.mktemp("guide") / "train.py"
    path.write_text(code)
    return runpy.run_path(str(path))["train_adapter"]


def batches(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Steps towards what the full-precision model does with an adapter of somebody else's, at three timesteps."""
    denoiser = wan()
    teacher = denoiser.load(denoiser.copy(), denoiser.adapter(targets=("to_q", "to_k", "to_v", "to_out.0")))
    latents, text = noise(2, 4, 3, 8, 8), noise(2, 6, 32, seed=2)
    made = []
    for timestep in (900.0, 500.0, 100.0):
        steps = torch.full((2,), timestep)
        with torch.no_grad():
            target = teacher(latents, steps, text).sample
        made.append((latents.to(dtype), steps, text.to(dtype), target.to(dtype)))
    return [made[step % len(made)] for step in range(STEPS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_guide(train_adapter, wan_folder, tmp_path, dtype):
    pipe = WanPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig(), torch_dtype=dtype)
    model = pipe.transformer
    before = tensors(model)
    losses = train_adapter(model, batches(dtype), learning_rate=0.02)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert same(tensors(model), before)
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.grad is not None)

    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model))
    full_precision = WanPipeline.from_pretrained(wan_folder)
    plain = full_precision.transformer
    untrained = wan().run(plain)
    full_precision.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    quantized, full = wan().run(model.eval()).float(), wan().run(plain)
    model.disable_lora()
    assert cosine(quantized - wan().run(model).float(), full - untrained) > 0.98
    assert sqnr_db(quantized, full) >= 25.0


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = wan().load(wan().quantized(), wan().adapter())
        if checkpointing:
            model.enable_gradient_checkpointing()
        wan().call(model.train(), 500.0).square().sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0] and same(*gradients)


def test_gradients_of_an_adapter_are_those_on_the_full_precision_model():
    found = []
    for model in (wan().quantized(), wan().copy()):
        wan().call(wan().load(model, wan().adapter()), 500.0).square().sum().backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert min(cosine(gradient, found[1][name]) for name, gradient in found[0].items()) > 0.9
    together = [torch.cat([gradient.flatten() for gradient in each.values()]) for each in found]
    assert cosine(*together) > 0.99
