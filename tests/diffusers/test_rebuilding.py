"""Blocks that diffusers exchanges or rearranges: what the quantized layers in them do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch import nn

from qvd_core import QuantSpec, quantize_model
from qvd_core.clock import scattered_rows
from qvd_core.joined import JoinedLinears
from qvd_core.layers import QuantizedLayer
from qvd_diffusers import QVDError
from qvd_diffusers.rebuilding import rebuilding
from tests.diffusers.tiny import tiny_wan_transformer


@pytest.fixture
def animate(quantized_folder: Callable[[str], Path]) -> Any:
    return DiffusionPipeline.from_pretrained(quantized_folder("AnimateDiff"))


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


class TestRebuilding:
    def test_new_blocks_hold_the_very_same_layers(self, animate: Any) -> None:
        before = quantized_layers(animate.unet)
        with rebuilding(animate.unet):
            assert not quantized_layers(animate.unet)
            animate.enable_free_noise(context_length=2)
        assert quantized_layers(animate.unet) == before

    def test_a_failure_inside_leaves_the_model_as_it_was(self, animate: Any) -> None:
        before = quantized_layers(animate.unet)
        with pytest.raises(RuntimeError, match="inside"), rebuilding(animate.unet):
            raise RuntimeError("inside")
        assert quantized_layers(animate.unet) == before

    def test_a_layer_without_a_place_is_an_error_that_names_it(self, animate: Any) -> None:
        with pytest.raises(QVDError, match=r"mid_block\..* have no place"), rebuilding(animate.unet):
            animate.unet.mid_block = nn.Identity()

    def test_the_layers_that_stand_in_take_no_memory(self, animate: Any) -> None:
        names = quantized_layers(animate.unet)
        with rebuilding(animate.unet):
            weights = [animate.unet.get_submodule(name).weight for name in names]
            assert all(weight.untyped_storage().nbytes() <= 8 for weight in weights)


class TestJoinedProjections:
    @pytest.fixture
    def wan(self) -> WanTransformer3DModel:
        return quantize_model(tiny_wan_transformer().eval(), QuantSpec())

    def test_fusing_joins_what_is_there(self, wan: Any) -> None:
        attention = wan.blocks[0].attn1
        names = set(wan.state_dict())
        wan.fuse_qkv_projections()
        hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
        assert isinstance(attention.to_qkv, JoinedLinears)
        parts = [attention.to_q(hidden), attention.to_k(hidden), attention.to_v(hidden)]
        assert torch.equal(attention.to_qkv(hidden), torch.cat(parts, dim=-1))
        assert set(wan.state_dict()) == names  # what is saved loads as before

    def test_unfusing_removes_it(self, wan: Any) -> None:
        wan.fuse_qkv_projections()
        wan.unfuse_qkv_projections()
        assert not any(isinstance(module, JoinedLinears) for module in wan.modules())

    def test_a_float_model_fuses_as_diffusers_does(self) -> None:
        wan = tiny_wan_transformer().eval()
        wan.fuse_qkv_projections()
        assert type(wan.blocks[0].attn1.to_qkv) is nn.Linear


class TestScatteredRows:
    """When the frame of a row is not what counting would say."""

    def test_none_in_a_model_as_it_comes(self, animate: Any) -> None:
        assert scattered_rows(animate.unet) is None

    def test_windows_of_frames(self, animate: Any) -> None:
        with rebuilding(animate.unet):
            animate.enable_free_noise(context_length=2)
        assert "FreeNoiseTransformerBlock" in (scattered_rows(animate.unet) or "")

    def test_chunks(self, animate: Any) -> None:
        animate.unet.enable_forward_chunking(chunk_size=1)
        assert "splits its input" in (scattered_rows(animate.unet) or "")

    def test_context_parallelism(self, animate: Any) -> None:
        from types import SimpleNamespace

        animate.unet._parallel_config = SimpleNamespace(context_parallel_config=object())
        assert "context parallelism" in (scattered_rows(animate.unet) or "")

    @pytest.mark.parametrize("both_branches", [True, False])
    def test_faster_cache(self, both_branches: bool) -> None:
        from diffusers import hooks

        wan = tiny_wan_transformer()
        config = hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            is_guidance_distilled=both_branches,
            tensor_format="BCFHW",
            current_timestep_callback=lambda: 500,
        )
        wan.enable_cache(config)
        assert (scattered_rows(wan) is None) == both_branches
