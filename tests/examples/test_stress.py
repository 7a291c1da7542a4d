"""The stress test of the miniatures: another distribution of activations, the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNetMotionModel, WanTransformer3DModel
from torch import Tensor, nn

from examples.moving_digits import sampling
from examples.moving_digits.stress import (
    MARK,
    denoiser_of,
    measure_ranges,
    save_stressed,
    stress,
)
from qvd_core import QuantSpec, quantize_model
from qvd_core.errors import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_diffusers import QVDConfig

TIMESTEPS = (999.0, 600.0, 300.0, 1.0)
TOLERANCE = 1e-5
Denoise = Callable[[nn.Module, float], Tensor]


def tiny_wan(**options: Any) -> nn.Module:
    """Two random blocks of 4 heads of 8 channels, with trained-looking norms."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    depths = {"freq_dim": 16, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 16}
    torch.manual_seed(1)
    return randomized(WanTransformer3DModel(**{**sizes, **depths, **options}).eval())


def tiny_unet(**options: Any) -> nn.Module:
    """A random UNet of two levels with motion modules, with trained-looking norms."""
    torch.manual_seed(1)
    unet = UNetMotionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        **options,
    )
    return randomized(unet.eval())


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Norms and biases that are not the identity: a fold that forgets one of them shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def denoise_wan(model: Any, timestep: float, image_tokens: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    config = model.config
    x = torch.randn(2, config.in_channels, 3, 8, 8, generator=noise)
    # Image-conditioned Wan counts 512 prompt tokens from the end; the rest are the image's.
    text = torch.randn(2, 512 if image_tokens else 8, config.text_dim, generator=noise)
    image = torch.randn(2, image_tokens, config.image_dim, generator=noise) if image_tokens else None
    return model(x, torch.full((2,), timestep), text, encoder_hidden_states_image=image).sample


@torch.no_grad()
def denoise_unet(model: Any, timestep: float) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    config, frames = model.config, min(8, model.config.motion_max_seq_length)
    x = torch.randn(2, config.in_channels, frames, 8, 8, generator=noise)
    text = torch.randn(2 * frames, 6, config.cross_attention_dim, generator=noise)
    return model(x, timestep, text).sample


def denoise_by_pixel_time(model: Any, timestep: float) -> Tensor:
    """As in Wan 2.2's image-to-video: every token has a timestep of its own."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, 3, 8, 8, generator=noise)
    text = torch.randn(1, 8, model.config.text_dim, generator=noise)
    timesteps = torch.linspace(0, timestep, 3 * 4 * 4).unsqueeze(0)
    with torch.no_grad():
        return model(x, timesteps, text).sample


MODELS: dict[str, tuple[Callable[[], nn.Module], Denoise]] = {
    "tiny Wan": (tiny_wan, denoise_wan),
    "tiny Wan without cross-attention norm": (lambda: tiny_wan(cross_attn_norm=False), denoise_wan),
    "tiny Wan with an image": (
        lambda: tiny_wan(image_dim=24, added_kv_proj_dim=32),
        lambda model, timestep: denoise_wan(model, timestep, image_tokens=5),
    ),
    "tiny Wan with a timestep per token": (tiny_wan, denoise_by_pixel_time),
    "tiny UNet": (tiny_unet, denoise_unet),
    "tiny UNet with linear projections": (lambda: tiny_unet(use_linear_projection=True), denoise_unet),
    "trained Wan": (lambda: trained("wan"), denoise_wan),
    "trained UNet": (lambda: trained("unet"), denoise_unet),
}


def trained(name: str) -> nn.Module:
    """The committed denoiser, without the rest of its pipeline."""
    classes = {"wan": WanTransformer3DModel, "unet": UNetMotionModel}
    subfolder = {"wan": "transformer", "unet": "unet"}[name]
    return classes[name].from_pretrained(sampling.miniature(name), subfolder=subfolder)


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_preserved(name: str) -> None:
    build, denoise = MODELS[name]
    model = build()
    before = [denoise(model, timestep) for timestep in TIMESTEPS]
    assert stress(model) is model
    for timestep, expected in zip(TIMESTEPS, before, strict=True):
        error = (denoise(model, timestep) - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE, f"at timestep {timestep}"


@pytest.mark.parametrize("name", ["trained Wan", "trained UNet"])
def test_the_ranges_become_those_of_large_models(name: str) -> None:
    build, denoise = MODELS[name]
    model = build()

    def run() -> None:
        for timestep in TIMESTEPS:
            denoise(model, timestep)

    before = measure_ranges(model, run)
    stress(model)
    after = measure_ranges(model, run)
    assert after.disparity >= 5 * before.disparity
    assert after.coverage <= 0.6 * before.coverage
    assert after.one_sided >= before.one_sided + 0.05
    assert after.asymmetric > before.asymmetric


def test_ranges_of_a_known_input() -> None:
    """Channels [-1, 1], [-1, 1], [2, 4] and [-10, 10]: half-ranges 1, 1, 1, 10 and a step of 10 / 127."""
    model = tiny_wan()
    low, high = torch.tensor([-1.0, -1.0, 2.0, -10.0]), torch.tensor([1.0, 1.0, 4.0, 10.0])
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    with pytest.MonkeyPatch.context() as patch:
        rows = torch.stack([low, high])
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        ranges = measure_ranges(model, lambda: [layer(rows) for layer in layers])
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert ranges.disparity == ranges.disparity_max == pytest.approx(10)
    assert ranges.one_sided == ranges.asymmetric == pytest.approx(1 / 4)
    assert ranges.coverage == pytest.approx((26 + 26 + 26 + 254) / 255 / 4)


@pytest.mark.parametrize("build", [tiny_wan, tiny_unet])
def test_one_seed_one_result(build: Callable[[], nn.Module]) -> None:
    first, again, other = (stress(build(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("build", [tiny_wan, tiny_unet])
def test_no_strength_changes_nothing_and_names_and_shapes_always_stay(
    build: Callable[[], nn.Module],
) -> None:
    plain = build().state_dict()
    unchanged, changed = stress(build(), strength=0.0).state_dict(), stress(build()).state_dict()
    for state in (unchanged, changed):
        assert state.keys() == plain.keys()
        assert all(state[name].shape == plain[name].shape and state[name].dtype == plain[name].dtype for name in plain)
    # 1 + t - 1 rounds: the rows of the Wan tables may differ in the last bit.
    torch.testing.assert_close(unchanged, plain, rtol=0, atol=1e-7)
    assert any(not torch.equal(changed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", sampling.MINIATURES)
def test_the_saved_pipeline_loads_in_full_precision_and_in_int8(name: str, tmp_path: Path) -> None:
    folder = save_stressed(name, tmp_path / name, seed=2)
    stressed = stress(trained(name), seed=2)
    assert sampling.load_call(folder) == sampling.load_call(sampling.miniature(name))
    loaded: Any = denoiser_of(sampling.load_pipeline(folder))
    state, again = stressed.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    assert loaded.config[MARK] == {"seed": 2, "strength": 1.0}
    with pytest.raises(QVDError, match="stressed already"):
        stress(loaded)
    quantized = denoiser_of(sampling.load_pipeline(folder, quantization_config=QVDConfig()))
    assert any(isinstance(module, QuantizedLayer) for module in quantized.modules())
    denoise = {"wan": denoise_wan, "unet": denoise_unet}[name]
    assert torch.isfinite(denoise(quantized, 500.0)).all()


def test_refusals_name_the_cause_and_change_nothing() -> None:
    refused: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("AutoencoderKL", AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), {}),
        ("quantized already", quantize_model(tiny_wan(), QuantSpec()), {}),
        ("stressed already", stress(tiny_wan()), {}),
        ("torch.bfloat16", tiny_wan().bfloat16(), {}),
        ("on meta", tiny_wan().to("meta"), {}),
        ("strength", tiny_wan(), {"strength": -1.0}),
        ("strength", tiny_wan(), {"strength": float("nan")}),
        ("seed", tiny_wan(), {"seed": 0.5}),
    ]
    for message, model, options in refused:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(QVDError, match=message):
            stress(model, **options)
        after = model.state_dict()
        assert all(after[name].is_meta or torch.equal(after[name], before[name]) for name in before)


def test_fused_projections_are_refused() -> None:
    model: Any = tiny_wan()
    model.blocks[0].attn1.fuse_projections()
    with pytest.raises(QVDError, match=r"blocks\.0\.attn1 has fused projections"):
        stress(model)


def test_adapters_are_refused() -> None:
    lora = pytest.importorskip("peft")
    model: Any = tiny_wan()
    model.add_adapter(lora.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(QVDError, match=r"to_q has an adapter"):
        stress(model)
