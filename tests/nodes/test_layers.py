"""Layers for ComfyUI: bit for bit `qvd_core`'s, whether ComfyUI merges a patch or applies it on the way."""

from __future__ import annotations

from typing import Any

import comfy.ops
import pytest
import torch
from comfy import model_management
from comfy.model_patcher import LowVramPatch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_nodes.layers import Linear, QuantizedOp, QVDOperations, attach_clock, quantized_layers
from qvd_nodes.layout import is_quantized
from qvd_nodes.quantize import quantize_patcher
from qvd_nodes.weights import denoiser
from tests.nodes import models
from tests.nodes.layer_cases import INPUTS, OUTPUTS, Case, case

kinds = pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d", "temporal"])


def difference(made: Case, seed: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(made.module.weight.shape, generator=generator) * made.module.weight.float().std()


def patch(made: Case, seed: int = 8, strength: float = 1.0) -> LowVramPatch:
    return LowVramPatch("it", {"it": [(strength, ("diff", (difference(made, seed),)), 1.0, None, None)]})


def merged(made: Case, seed: int = 8) -> QuantizedOp:
    """The layer after ComfyUI has merged the patch."""
    layer = made.outer()
    value = layer.convert_weight(layer.weight.to(torch.float32, copy=True), inplace=True)
    layer.set_weight(patch(made, seed)(value), inplace_update=False, seed=1)
    return layer


@torch.inference_mode()
def run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).clone()


class TestOutput:
    @kinds
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"calibrated": False},
            {"activation": "static"},
            {"rotation": 16, "weight_bits": 4},
            {"bias": False, "calibrated": False, "activation_bits": 6},
            {"dtype": torch.bfloat16},
            {"dtype": torch.float16},
        ],
        ids=str,
    )
    def test_is_the_cores_bit_for_bit(self, kind: str, settings: dict[str, Any]) -> None:
        made = case(kind, **settings)
        expected = run(made.core(), made.x)
        layer = made.outer()
        for _ in range(2):  # the second call takes what the first has built
            found = run(layer, made.x)
            assert found.dtype == made.x.dtype and torch.equal(found, expected)

    @kinds
    def test_without_inference_mode(self, kind: str) -> None:
        made = case(kind)
        with torch.no_grad():
            assert torch.equal(made.outer()(made.x), run(made.core(), made.x))

    @kinds
    def test_until_it_has_a_quantized_weight_it_is_comfyuis_own(self, kind: str) -> None:
        made = case(kind)
        layer = {"linear": QVDOperations.Linear, "conv2d": QVDOperations.Conv2d, "conv3d": QVDOperations.Conv3d}[
            "linear" if kind == "temporal" else kind
        ]
        plain = layer.__new__(layer)
        nn.Module.__init__(plain)
        plain.__dict__.update({k: v for k, v in made.module.__dict__.items() if k not in ("_backward_hooks",)})
        assert torch.equal(run(plain, made.x), run(made.module, made.x))

    def test_takes_its_input_alone(self) -> None:
        made = case("conv3d")
        layer = made.outer()
        assert torch.equal(layer(made.x, autopad=None), layer(made.x))
        with pytest.raises(QVDError, match="no other arguments"):
            layer(made.x, autopad="causal_zero")

    def test_the_user_can_interrupt_between_layers(self) -> None:
        made = case()
        layer = made.outer()
        model_management.interrupt_current_processing()
        with pytest.raises(model_management.InterruptProcessingException):
            layer(made.x)

    def test_a_bias_of_another_type_is_used_as_it_is_stored(self) -> None:
        """The bias holds what the shift has added to it: rounding it to the input's type would cost more than int8."""
        made = case(dtype=torch.float32)
        out = run(made.outer(), made.x.bfloat16())
        assert torch.equal(out, run(made.core(), made.x.bfloat16()))


class TestPatches:
    @kinds
    @pytest.mark.parametrize("settings", [{}, {"rotation": 8, "weight_bits": 4}, {"activation": "static"}], ids=str)
    def test_applied_on_the_way_it_is_as_merged(self, kind: str, settings: dict[str, Any]) -> None:
        made = case(kind, **settings)
        expected = run(merged(made), made.x)
        low_vram, dynamic = made.outer(), made.outer()
        low_vram.weight_function = [patch(made)]
        dynamic.weight_lowvram_function = patch(made)  # type: ignore[assignment]
        dynamic.seed_key = "it.weight"  # type: ignore[assignment]
        assert torch.equal(run(low_vram, made.x), expected)
        assert torch.equal(run(dynamic, made.x), expected)
        assert not torch.equal(expected, run(made.outer(), made.x))

    @kinds
    def test_it_is_close_to_the_float_layer_with_the_same_patch(self, kind: str) -> None:
        made = case(kind)
        out = run(merged(made), made.x)
        made.module.weight.add_(difference(made))
        assert models.sqnr_db(out, run(made.module, made.x)) > (20 if "conv" in kind else 30)  # padded: wider than x

    def test_one_that_changes_nothing_leaves_the_codes(self) -> None:
        layer = case().outer()
        before = layer.weight
        layer.set_weight(layer.convert_weight(layer.weight.to(torch.float32, copy=True)))
        assert torch.equal(layer.weight._qdata, before._qdata) and layer.weight._params.fold is None

    def test_setting_can_return_the_weight_instead(self) -> None:
        made = case()
        layer = made.outer()
        before = layer.weight
        value = layer.convert_weight(layer.weight) + difference(made)
        returned = layer.set_weight(value, inplace_update=False, seed=3, return_weight=True)
        assert layer.weight is before and is_quantized(returned)
        assert torch.equal(returned.dequantize(), merged(made).weight.dequantize())

    def test_the_type_of_the_model_stays(self) -> None:
        made = case(dtype=torch.bfloat16)
        layer = made.outer()
        layer.set_weight(layer.convert_weight(layer.weight).float() + difference(made))
        assert layer.weight.dtype == torch.bfloat16

    def test_a_float_layer_takes_the_weight_as_it_is(self) -> None:
        layer = Linear(4, 3)
        layer.set_weight(torch.ones(3, 4))
        assert torch.equal(layer.weight, torch.ones(3, 4)) and layer.convert_weight(layer.weight) is layer.weight

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_is_refused_in_plain_words(self, value: float) -> None:
        layer = case().outer()
        weight = layer.convert_weight(layer.weight).clone()
        weight[0, 0] = value
        with pytest.raises(QVDError, match="NaN or infinity: the LoRA is damaged"):
            layer.set_weight(weight)

    def test_a_portable_layer_takes_no_patch_but_bears_being_read(self) -> None:
        made = case(calibrated=False, portable=True)
        layer = made.outer()
        layer.set_weight(layer.convert_weight(layer.weight))
        with pytest.raises(QVDError, match="Put the LoRA loader before QVD Quantize Model"):
            layer.set_weight(layer.convert_weight(layer.weight) + difference(made))

    @pytest.mark.parametrize("lowvram", [0, 1])
    def test_a_whole_model_with_a_lora(self, lowvram: int, wan: Any, scales_for: Any) -> None:
        scales = scales_for()
        quantized = quantize_patcher(wan, scales.spec, scales)
        layers = ["blocks.0.self_attn.q", "blocks.1.ffn.2", "time_projection.1"]
        patched = models.with_lora(quantized, layers)
        patched.patch_model(models.CPU, lowvram_model_memory=lowvram)
        found = models.denoise(patched)
        patched.unpatch_model(models.CPU)
        again = models.denoise(quantized)
        reference = quantize_patcher(wan, scales.spec, scales)
        assert torch.equal(again, models.denoise(reference))
        for name in layers:
            key = f"diffusion_model.{name}.weight"
            layer = denoiser(reference).get_submodule(name)
            value = layer.convert_weight(layer.weight) + patched.patches[key][0][1][1][0]
            layer.set_weight(value)
        assert torch.equal(found, models.denoise(reference)) and not torch.equal(found, again)


class TestTable:
    """A temporal projection remembers its outputs for as long as nothing they depend on changes."""

    def test_a_known_timestep_does_not_ask_for_the_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = case("temporal")
        layer = made.outer()
        layer.weight_function = [patch(made)]  # as in low VRAM: the weight is elsewhere, and patched on the way
        casts = []
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *a, **k: casts.append(1) or original(*a, **k))
        first = run(layer, made.x)
        assert len(casts) == 1
        assert torch.equal(run(layer, made.x), first) and len(casts) == 1
        run(layer, made.x + 1)
        assert len(casts) == 2

    @pytest.mark.parametrize("change", ["weight", "bias", "patch", "written", "set"])
    def test_a_change_is_noticed(self, change: str) -> None:
        made, other = case("temporal"), case("temporal")
        layer = made.outer()
        before = run(layer, made.x)
        if change == "weight":
            layer.weight = merged(made).weight
        elif change == "set":
            layer.set_weight(layer.convert_weight(layer.weight) + difference(made))
        elif change == "written":
            layer.weight.data.copy_(merged(made).weight)
        elif change == "patch":
            layer.weight_function = [patch(made)]
        else:
            layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
        expected = before + 1 if change == "bias" else run(merged(other), made.x)
        torch.testing.assert_close(run(layer, made.x), expected)
        assert not torch.equal(run(layer, made.x), before)

    def test_a_patch_taken_away_is_noticed(self) -> None:
        made = case("temporal")
        layer = made.outer()
        before = run(layer, made.x)
        layer.weight_function = [patch(made)]
        run(layer, made.x)
        layer.weight_function = []
        assert torch.equal(run(layer, made.x), before)

    def test_it_is_not_a_part_of_the_module(self) -> None:
        layer = case("temporal").outer()
        run(layer, case("temporal").x)
        assert [name for name, _ in layer.named_modules()] == [""]


original = comfy.ops.cast_bias_weight


class TestMoving:
    def test_where_nothing_changes_the_parameters_stay_the_same_objects(self) -> None:
        layer = case().outer()
        weight, bias = layer.weight, layer.bias
        layer.to("cpu")
        assert layer.weight is weight and layer.bias is bias

    def test_a_cast_leaves_codes_and_scales(self) -> None:
        layer = case().outer()
        codes, scale = layer.weight._qdata, layer.weight._params.scale
        layer.to(torch.bfloat16)
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
        assert torch.equal(layer.weight._qdata, codes) and torch.equal(layer.weight._params.scale, scale)

    def test_away_and_back(self) -> None:
        layer = case().outer()
        layer.to("meta")
        assert layer.weight._qdata.is_meta and layer.weight._params.input_shift.is_meta and layer.bias.is_meta

    @kinds
    def test_a_layer_made_in_inference_mode_moves_outside_of_it(self, kind: str) -> None:
        with torch.inference_mode():
            made = case(kind)
            layer = made.outer()
            expected = layer(made.x).clone()
        layer.to(torch.bfloat16).to(torch.float32)
        with torch.no_grad():
            assert layer(made.x).shape == expected.shape
        assert is_quantized(layer.weight)


class TestStateDict:
    @kinds
    @pytest.mark.parametrize("settings", [{}, {"weight_bits": 4}, {"activation": "static"}], ids=str)
    def test_is_the_checkpoint_format(self, kind: str, settings: dict[str, Any]) -> None:
        made = case(kind, **settings)
        found, expected = made.outer().state_dict(prefix="a."), made.core().state_dict(prefix="a.")
        assert found.keys() == {*expected, "a.comfy_quant"}
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert all(type(tensor) is Tensor for tensor in found.values())

    def test_a_changed_weight_takes_its_fold_into_the_bias(self) -> None:
        made = case()
        layer = merged(made)
        stored = layer.state_dict()
        torch.testing.assert_close(stored["bias"], layer.bias + layer.weight._params.fold)
        fresh = Case(made.module, made.x, stored, made.recipe)
        assert torch.equal(run(fresh.outer(), made.x), run(layer, made.x))

    def test_every_entry_is_an_attribute(self) -> None:
        """ComfyUI looks a weight up by its name in the state dict."""
        layer = case("temporal", activation="static").outer()
        for name, tensor in layer.state_dict().items():
            found = getattr(layer, name)
            assert is_quantized(found) if name == "weight" else torch.equal(found, tensor)
        with pytest.raises(AttributeError):
            layer.input_shift  # noqa: B018 - it has none

    def test_loading_one_gives_the_layer(self) -> None:
        made = case()
        layer = QVDOperations.Linear(INPUTS, OUTPUTS)
        layer.load_state_dict({"weight": made.weight, "bias": made.bias})
        assert torch.equal(run(layer, made.x), run(made.outer(), made.x))

    def test_one_of_another_model_is_refused(self) -> None:
        made = case()
        with pytest.raises(QVDError, match=r"\[16, 32\], this model's is \[8, 32\]"):
            QVDOperations.Linear(INPUTS, 8).load_state_dict({"weight": made.weight})

    def test_a_float_one_is_loaded_as_usual(self) -> None:
        layer = QVDOperations.Linear(4, 3)
        layer.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
        assert torch.equal(layer.weight, torch.ones(3, 4)) and "comfy_quant" not in layer.state_dict()


class TestClock:
    def test_only_scales_that_change_while_sampling_need_one(self, wan: Any, scales_for: Any) -> None:
        plain = denoiser(quantize_patcher(wan, scales_for().spec, scales_for()))
        bucketed = scales_for(activation="static_bucket")
        several = denoiser(quantize_patcher(wan, bucketed.spec, bucketed))
        assert not plain._forward_pre_hooks and len(several._forward_pre_hooks) == 1
        clocks = {id(layer.clock) for layer in quantized_layers(several).values() if layer.clock is not None}
        assert len(clocks) == 1

    def test_attaching_again_leaves_one(self, wan: Any, scales_for: Any) -> None:
        scales = scales_for(activation="static_bucket")
        model = denoiser(quantize_patcher(wan, scales.spec, scales))
        attach_clock(model)
        assert len(model._forward_pre_hooks) == 1
