"""A MODEL to an int8 MODEL: patches before and after, the original as it was, refusals in plain words."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from qvd_core import QuantSpec, quantize_model
from qvd_core.errors import QVDError
from qvd_nodes.layers import quantized_layers
from qvd_nodes.quantize import COMPILE_WRAPPER, quantize_patcher
from qvd_nodes.record import record_of
from qvd_nodes.weights import denoiser, patched_tensor, patched_weights
from tests.nodes import models

FAST = QuantSpec(temporal_quantizer="power")
LAYERS = ["blocks.0.self_attn.v", "blocks.1.ffn.0", "time_projection.1"]


def reference(source: ModelPatcher, spec: QuantSpec, scales: Any = None, merged: Any = None) -> torch.Tensor:
    """The denoiser's output after `qvd_core.quantize_model`, LoRA merged before in float64."""
    model = copy.deepcopy(denoiser(source))
    for key, patch in (merged or {}).items():
        weight = model.get_parameter(key.removeprefix("diffusion_model."))
        weight.copy_((weight.double() + patch[1][0].double()).float())
    plain = copy.copy(source)
    plain.model = nn.Module()
    plain.model.diffusion_model = quantize_model(model, spec, scales)
    return models.denoise(plain)


@pytest.mark.parametrize("activation", [None, "token", "static", "static_bucket", "static_frame"])
@pytest.mark.parametrize("config", [models.WanConfig, models.ConvolutionsConfig])
def test_is_what_the_core_makes_of_the_denoiser(config: Any, activation: str | None, scales_for: Any) -> None:
    source = models.patcher(config)
    scales = None if activation is None else scales_for(config, activation=activation)
    spec = FAST if scales is None else scales.spec
    quantized = quantize_patcher(source, spec, scales)
    assert torch.equal(models.denoise(quantized), reference(source, spec, scales))


def test_sampled_it_is_close_to_the_float_model(wan: ModelPatcher, scales_for: Any) -> None:
    scales = scales_for()
    found = models.sqnr_db(models.sample(quantize_patcher(wan, scales.spec, scales)), models.sample(wan))
    assert found > 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_stays_one(dtype: torch.dtype) -> None:
    quantized = quantize_patcher(models.patcher(models.WanConfig, dtype), FAST)
    assert {tensor.dtype for tensor in quantized.model.parameters()} == {dtype}
    assert models.sample(quantized).isfinite().all()


def test_the_original_stays_bit_for_bit_also_after_the_copys_end(wan: ModelPatcher, scales_for: Any) -> None:
    before, expected = models.snapshot(wan), models.sample(wan)
    before = models.snapshot(wan) if models.unchanged(wan, before) else before
    scales = scales_for()
    quantized = models.with_lora(quantize_patcher(wan, scales.spec, scales), LAYERS)
    models.sample(quantized)
    model_management.unload_all_models()
    del quantized
    assert models.unchanged(wan, before) and torch.equal(models.sample(wan), expected)


def test_two_of_one_source_are_independent(wan: ModelPatcher) -> None:
    first, second = quantize_patcher(wan, FAST), quantize_patcher(wan, replace(FAST, weight_bits=4))
    expected = models.denoise(first)
    models.sample(models.with_lora(second, LAYERS))
    assert torch.equal(models.denoise(first), expected)


class TestPatches:
    def test_before_they_are_quantized_with_the_weights(self, wan: ModelPatcher) -> None:
        patched = models.with_lora(wan, LAYERS)
        expected = reference(wan, FAST, merged=models.lora(wan, LAYERS))
        quantized = quantize_patcher(patched, FAST)
        assert torch.equal(models.denoise(quantized), expected)
        assert not quantized.patches and patched.patches

    @pytest.mark.parametrize("loaded", ["itself", "a clone", "in low VRAM"])
    def test_what_is_loaded_does_not_matter(self, wan: ModelPatcher, loaded: str) -> None:
        """A loaded clone's patches are in the memory that all clones share."""
        patched = models.with_lora(wan, LAYERS)
        expected = models.denoise(quantize_patcher(patched, FAST))
        if loaded == "in low VRAM":
            model_management.current_loaded_models.append(model_management.LoadedModel(patched))
            patched.patch_model(models.CPU, lowvram_model_memory=1)
        else:
            model_management.load_models_gpu([patched if loaded == "itself" else models.with_lora(wan, ["head.head"])])
        assert torch.equal(models.denoise(quantize_patcher(patched, FAST)), expected)

    def test_of_layers_that_stay_in_float_stay_patches(self, wan: ModelPatcher) -> None:
        patched = models.with_lora(wan, [*LAYERS, "head.head"])
        quantized = quantize_patcher(patched, FAST)
        assert set(quantized.patches) == {"diffusion_model.head.head.weight"}

    def test_behind_they_are_merged_when_the_model_is_loaded(self, wan: ModelPatcher) -> None:
        quantized = quantize_patcher(wan, FAST)
        plain = models.sample(quantized)
        for strength in (1.0, 0.5):
            float_lora = models.sample(models.with_lora(wan, LAYERS, strength))
            found = models.sample(models.with_lora(quantized, LAYERS, strength))
            assert models.sqnr_db(found, float_lora) > 25 > models.sqnr_db(plain, float_lora)
        assert torch.equal(models.sample(quantized), plain)

    def test_whatever_mode_it_was_made_moved_and_patched_in(self, wan: ModelPatcher) -> None:
        """Nodes run in inference mode; the button that frees memory, and scripts, do not."""
        with torch.inference_mode():
            quantized = quantize_patcher(wan, FAST)
        plain = models.sample(quantized)
        for _ in range(3):
            for strength in (1.0, 0.5):
                found = models.sample(models.with_lora(quantized, LAYERS, strength))
                assert not torch.equal(found, plain)
            model_management.unload_all_models()
            assert torch.equal(models.sample(quantized), plain)

    def test_read_one_by_one(self, wan: ModelPatcher) -> None:
        patched = models.with_lora(wan, ["blocks.0.ffn.0"], strength=0.5)
        read = patched_weights(patched)
        weight, bias = read("blocks.0.ffn.0")
        layer = denoiser(wan).get_submodule("blocks.0.ffn.0")
        change = models.lora(wan, ["blocks.0.ffn.0"])["diffusion_model.blocks.0.ffn.0.weight"][1][0]
        torch.testing.assert_close(weight, layer.weight + 0.5 * change)
        assert torch.equal(bias, layer.bias) and not torch.equal(layer.weight, weight)

    def test_an_unpatched_tensor_keeps_its_type(self) -> None:
        wan = models.patcher(models.WanConfig, torch.float16)
        read = patched_weights(models.with_lora(wan, ["blocks.0.ffn.0"]))
        assert read("blocks.0.ffn.2")[0].dtype == torch.float16 and read("blocks.0.ffn.0")[0].dtype == torch.float32
        assert patched_tensor(wan, "blocks.0.norm1.weight", models.CPU) is None


class TestPortable:
    def test_producers_take_over_what_the_layers_may_not_hold(self, wan: ModelPatcher, scales_for: Any) -> None:
        scales = scales_for(portable=True)
        before = models.snapshot(wan)
        patched = models.with_lora(wan, LAYERS, strength=0.2)
        for source in (wan, patched):
            quantized = quantize_patcher(source, scales.spec, scales)
            layers = quantized_layers(denoiser(quantized))
            assert all(layer.weight._params.input_shift is None for layer in layers.values())
            assert models.sqnr_db(models.denoise(quantized), _merged(source)) > 25
        assert models.unchanged(wan, before)
        edited = denoiser(quantized).blocks[0].norm3.weight
        assert not torch.equal(edited, denoiser(wan).blocks[0].norm3.weight)


def _merged(source: ModelPatcher) -> torch.Tensor:
    source.patch_model(models.CPU)
    out = models.denoise(source)
    source.unpatch_model(models.CPU)
    return out


class TestRefused:
    @pytest.mark.parametrize("what", [None, "text", object()])
    def test_no_model(self, what: Any) -> None:
        with pytest.raises(QVDError, match="no diffusion model: connect the MODEL output of a loader"):
            quantize_patcher(what, FAST)

    def test_a_text_encoder(self) -> None:
        other = ModelPatcher(nn.Linear(2, 2), models.CPU, models.CPU)
        with pytest.raises(QVDError, match="a Linear is no diffusion model"):
            quantize_patcher(other, FAST)

    def test_quantized_already(self, wan: ModelPatcher) -> None:
        quantized = quantize_patcher(wan, FAST)
        with pytest.raises(QVDError, match="quantized by QVD already: connect the one from before"):
            quantize_patcher(quantized, FAST)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_weights_of_eight_bits(self, wan: ModelPatcher, dtype: torch.dtype) -> None:
        layer = denoiser(wan).blocks[0].ffn[0]
        layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        with pytest.raises(QVDError, match=r"quantized already .*full precision"):
            quantize_patcher(wan, FAST)

    def test_scales_of_another_model(self, wan: ModelPatcher, scales_for: Any) -> None:
        scales = scales_for(models.ConvolutionsConfig)
        with pytest.raises(QVDError, match="ConvolutionDenoiser"):
            quantize_patcher(wan, scales.spec, scales)

    def test_scales_of_other_weights(self, scales_for: Any) -> None:
        scales = scales_for()
        with pytest.raises(QVDError, match="weight"):
            quantize_patcher(models.patcher(models.WanConfig, seed=5), scales.spec, scales)

    @pytest.mark.parametrize("name", ["blocks.1.ffn.0.weight", "blocks.1.ffn.0.bias"])
    def test_nan(self, wan: ModelPatcher, name: str) -> None:
        denoiser(wan).get_parameter(name).view(-1)[3] = torch.nan
        with pytest.raises(QVDError, match=f"{name} holds NaN"):
            quantize_patcher(wan, FAST)

    def test_a_lora_with_nan(self, wan: ModelPatcher) -> None:
        patched = models.with_lora(wan, ["blocks.1.ffn.0"], strength=float("nan"))
        with pytest.raises(QVDError, match="NaN"):
            quantize_patcher(patched, FAST)

    def test_static_scales_without_any(self, wan: ModelPatcher) -> None:
        with pytest.raises(QVDError, match="needs calibrated scales"):
            quantize_patcher(wan, replace(FAST, activation="static"))

    def test_a_patch_that_changes_the_shape(self, wan: ModelPatcher) -> None:
        wide = ("diff", (torch.zeros(64, 40), {"pad_weight": True}))
        wan.add_patches({"diffusion_model.blocks.0.ffn.0.weight": wide})
        with pytest.raises(QVDError, match=r"changes the shape of blocks.0.ffn.0.weight from \[64, 32\] to \[64, 40\]"):
            quantize_patcher(wan, FAST)

    @pytest.mark.parametrize("spoil", ["nan", "interrupt"])
    def test_the_original_bears_it(self, wan: ModelPatcher, spoil: str) -> None:
        before = models.snapshot(wan)
        error: Any = QVDError
        patched = models.with_lora(wan, ["blocks.1.ffn.0"], strength=float("nan")) if spoil == "nan" else wan
        if spoil == "interrupt":
            model_management.interrupt_current_processing()
            error = model_management.InterruptProcessingException
        with pytest.raises(error):
            quantize_patcher(patched, FAST)
        assert models.unchanged(wan, before)


class TestOtherNodes:
    def test_what_was_compiled_before_is_the_float_model_and_is_taken_off(self, wan: ModelPatcher) -> None:
        compiled = wan.clone()
        compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_WRAPPER, lambda executor, *args: executor(*args))
        quantized = quantize_patcher(compiled, FAST)
        assert not quantized.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_WRAPPER)
        assert compiled.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_WRAPPER)

    def test_a_float_part_that_would_take_the_place_of_int8_is_refused(self, wan: ModelPatcher) -> None:
        replaced = wan.clone()
        replaced.object_patches["diffusion_model.blocks.0"] = nn.Identity()
        with pytest.raises(QVDError, match="behind QVD Quantize Model"):
            quantize_patcher(replaced, FAST)

    def test_merges_and_patches_see_the_float_bias(self, wan: ModelPatcher, scales_for: Any) -> None:
        """Of a layer with a shift the stored bias holds the shift's share, which is another one in every MODEL."""
        scales = scales_for()
        layers = quantized_layers(denoiser(quantize_patcher(wan, scales.spec, scales)))
        shifted = {name: layer for name, layer in layers.items() if layer.weight._params.input_shift is not None}
        assert shifted
        for name, layer in shifted.items():
            own = denoiser(wan).get_submodule(name).bias
            found = layer.convert_bias(layer.bias)
            assert torch.allclose(found, own, atol=0.05)
            assert torch.allclose(layer.set_bias(found, return_weight=True), layer.bias, atol=1e-5)
            layer.set_weight(layer.convert_weight(layer.weight) * 0.5)
            assert torch.allclose(layer.convert_bias(layer.bias), found, atol=0.05)


class TestRecord:
    def test_what_it_knows_of_itself(self, wan: ModelPatcher, scales_for: Any) -> None:
        scales = scales_for()
        quantized = quantize_patcher(wan, scales.spec, scales)
        record = record_of(quantized.clone())
        assert record.spec == scales.spec and record.family == "Wan" and record.calibrated
        assert record.report == scales.report and record.calibrated_on == scales.calibrated_on
        linears = sum(isinstance(module, nn.Linear | nn.Conv3d) for module in denoiser(wan).modules())
        assert record.layers_in_all == linears
        assert record.float_bytes == sum(tensor.nbytes for tensor in denoiser(wan).state_dict().values())

    def test_progress_is_told_for_every_layer(self, wan: ModelPatcher) -> None:
        told: list[tuple[int, int]] = []
        quantized = quantize_patcher(wan, FAST, progress=lambda done, total: told.append((done, total)))
        count = len(quantized_layers(denoiser(quantized)))
        assert told == [(done, count) for done in range(count + 1)]
