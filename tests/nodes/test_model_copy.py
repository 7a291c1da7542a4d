"""A second model on the memory of a first one, and a MODEL that can be made anew."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from comfy import model_management
from comfy.model_patcher import LowVramPatch, ModelPatcher

from qvd_core.errors import QVDError
from qvd_nodes.layers import quantized_layers
from qvd_nodes.model_copy import copy_base_model, original_weight
from qvd_nodes.quantize import quantize_patcher
from qvd_nodes.weights import denoiser
from tests.nodes import models

KEY = "diffusion_model.blocks.0.ffn.0.weight"


@pytest.fixture(params=["float", "int8"])
def source(request: pytest.FixtureRequest, wan: ModelPatcher, scales_for: Any) -> ModelPatcher:
    if request.param == "float":
        return wan
    scales = scales_for(activation="static_bucket")
    return quantize_patcher(wan, scales.spec, scales)


def memory(tensor: Any) -> int:
    return getattr(tensor, "_qdata", tensor).data_ptr()


class TestCopy:
    def test_shares_memory_but_neither_parameters_nor_modules(self, source: ModelPatcher) -> None:
        twin = copy_base_model(source.model)
        pairs = list(zip(source.model.named_parameters(), twin.named_parameters(), strict=True))
        assert pairs
        for (name, own), (twin_name, other) in pairs:
            assert name == twin_name and own is not other and memory(own) == memory(other), name
        own_modules = {id(module) for module in source.model.modules()}
        assert not own_modules & {id(module) for module in twin.modules()}

    def test_computes_the_same(self, source: ModelPatcher) -> None:
        expected = models.denoise(source)
        other = ModelPatcher(copy_base_model(source.model), models.CPU, models.CPU)
        assert torch.equal(models.denoise(other), expected)

    def test_the_configuration_is_shared(self, source: ModelPatcher) -> None:
        """It cannot be copied: it answers None for every special method."""
        twin = copy_base_model(source.model)
        assert twin.model_config is source.model.model_config and twin.latent_format is source.model.latent_format

    def test_what_happens_to_the_copy_does_not_happen_to_the_original(self, source: ModelPatcher) -> None:
        before = models.snapshot(source)
        twin = ModelPatcher(copy_base_model(source.model), models.CPU, models.CPU)
        twin.add_patches(models.lora(twin, ["blocks.0.ffn.0"]))
        twin.model.diffusion_model.blocks[1] = torch.nn.Identity()
        twin.model.model_sampling.set_parameters(shift=7.0)
        twin.patch_model(models.CPU)
        assert models.unchanged(source, before) and source.model.model_sampling.shift == 1.0

    def test_loading_leaves_nothing_on_it(self, wan: ModelPatcher) -> None:
        """Places in a GPU's memory belong to one model; a number is one object wherever it occurs, and must stay."""
        block = wan.model.diffusion_model.blocks[0]
        layer, other = block.ffn[0], block.ffn[2]
        shared = object()
        layer._v = layer._v_block = layer._pin = layer.weight_lowvram_function = shared
        layer._v_signature = True  # the same object as `True` everywhere else
        layer._prefetch = 1
        other.kept, other.count, other.nothing = True, 1, None
        layer.comfy_patched_weights = True
        layer.prev_comfy_cast_weights, layer.comfy_cast_weights = False, True
        layer.weight_function = [LowVramPatch(KEY, {KEY: []})]
        wan.model.dynamic_vbars = {"gpu": shared}
        wan.model.model_loaded_weight_memory, wan.model.current_patcher = 123, wan
        wan.model.current_weight_patches_uuid = uuid.uuid4()
        twin = copy_base_model(wan.model)
        copied = twin.diffusion_model.blocks[0].ffn
        gone = {"_v", "_v_block", "_v_signature", "_pin", "_prefetch", "weight_lowvram_function"}
        gone |= {"comfy_patched_weights", "prev_comfy_cast_weights"}
        assert not gone & set(copied[0].__dict__) and not hasattr(twin, "dynamic_vbars")
        assert (copied[2].kept, copied[2].count, copied[2].nothing) == (True, 1, None)
        assert copied[0].comfy_cast_weights is False and copied[0].weight_function == []
        assert twin.model_loaded_weight_memory == 0 and twin.current_patcher is None
        assert twin.current_weight_patches_uuid is None
        assert layer._v is shared and layer.weight_function and wan.model.current_patcher is wan

    def test_originals_come_from_the_backup(self, wan: ModelPatcher) -> None:
        expected = models.denoise(wan)
        patched = models.with_lora(wan, ["blocks.0.ffn.0"])
        patched.patch_model(models.CPU)
        assert not torch.equal(models.denoise(wan), expected)
        backup = {key: kept.weight for key, kept in patched.backup.items()}
        assert set(backup) == {KEY} and torch.equal(original_weight(patched, KEY), backup[KEY])
        twin = ModelPatcher(copy_base_model(wan.model, backup), models.CPU, models.CPU)
        assert torch.equal(models.denoise(twin), expected)

    def test_what_cannot_be_copied_is_said(self, wan: ModelPatcher) -> None:
        wan.model.diffusion_model.lock = __import__("threading").Lock()
        with pytest.raises(QVDError, match="another node pack has put something into it"):
            copy_base_model(wan.model)

    def test_clocks_are_the_models_own(self, wan: ModelPatcher, scales_for: Any) -> None:
        scales = scales_for(activation="static_bucket")
        source = quantize_patcher(wan, scales.spec, scales)
        twin = copy_base_model(source.model)
        clocks = [
            {id(layer.clock) for layer in quantized_layers(model.diffusion_model).values() if layer.clock}
            for model in (source.model, twin)
        ]
        assert [len(found) for found in clocks] == [1, 1] and not clocks[0] & clocks[1]
        hooks = list(twin.diffusion_model._forward_pre_hooks.values())
        assert [id(hook.__self__) for hook in hooks] == list(clocks[1])


class TestPatcher:
    def test_is_another_model_for_comfyuis_bookkeeping(self, wan: ModelPatcher) -> None:
        quantized = quantize_patcher(wan, _spec())
        assert quantized.parent is None and quantized.clone_base_uuid != wan.clone_base_uuid
        assert quantized.patches_uuid != wan.patches_uuid and quantized.backup is not wan.backup
        assert quantized.model_size() < 0.6 * wan.model_size()

    def test_options_and_patched_objects_come_along(self, wan: ModelPatcher) -> None:
        wan.model_options["transformer_options"]["mark"] = 3
        wan.add_object_patch("model_sampling", "another schedule")
        wan.set_attachments("other pack", "kept")
        quantized = quantize_patcher(wan, _spec())
        assert quantized.model_options["transformer_options"]["mark"] == 3
        assert quantized.get_model_object("model_sampling") == "another schedule"
        assert quantized.get_attachment("other pack") == "kept"

    @pytest.mark.parametrize("disable_dynamic", [True, False])
    def test_made_anew_it_gives_the_same(self, wan: ModelPatcher, scales_for: Any, disable_dynamic: bool) -> None:
        scales = scales_for()
        quantized = quantize_patcher(wan, scales.spec, scales)
        expected = models.sample(quantized)
        make, arguments = quantized.cached_patcher_init[:2]
        fresh = make(*arguments, disable_dynamic=disable_dynamic)
        assert fresh.model is not quantized.model and torch.equal(models.sample(fresh), expected)
        assert quantized_layers(denoiser(fresh)).keys() == quantized_layers(denoiser(quantized)).keys()

    def test_made_anew_while_a_lora_is_loaded_it_is_without_the_lora(self, wan: ModelPatcher) -> None:
        quantized = quantize_patcher(wan, _spec())
        expected = models.sample(quantized)
        patched = models.with_lora(quantized, ["blocks.0.ffn.0"])
        model_management.load_models_gpu([patched])
        make, arguments = patched.cached_patcher_init[:2]
        assert torch.equal(models.sample(make(*arguments)), expected)

    def test_a_deep_clone_stays_quantized_and_keeps_its_patches(self, wan: ModelPatcher) -> None:
        quantized = models.with_lora(quantize_patcher(wan, _spec()), ["blocks.0.ffn.0"])
        expected = models.sample(quantized)
        deep = quantized.clone(force_deepcopy=True)
        assert deep.model is not quantized.model and torch.equal(models.sample(deep), expected)


def _spec() -> Any:
    from qvd_core import QuantSpec

    return QuantSpec(temporal_quantizer="power")
