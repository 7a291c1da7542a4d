"""Conversion of whole models: close to full precision, reversible, and nothing half-changed on an error."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, convert, dequantize_model, quantize_model
from qvd_core.convert import fit_temporal_layers, install_layers
from qvd_core.layers import QuantizedLayer, QuantLinear
from qvd_core.plan import LayerPlan, plan_layers
from qvd_core.temporal_layer import TemporalLinear

POWER = {"temporal_quantizer": "power"}  # one small search instead of all
STATIC = QuantSpec(activation="static", **POWER)
# dB of the whole model's output on the calibration inputs; the random UNet amplifies noise about five bits' worth.
BOUNDS = {"wan": {8: 52.0, 6: 40.0, 4: 26.0}, "unet": {8: 27.0, 6: 15.0, 4: 5.0}}


@pytest.fixture
def bound(request):
    return BOUNDS[request.node.callspec.params["denoiser"]]


def temporal_layers(model: nn.Module) -> list[TemporalLinear]:
    return [layer for layer in model.modules() if isinstance(layer, TemporalLinear)]


class TestQuality:
    @pytest.mark.parametrize("spec", [QuantSpec(**POWER), STATIC, QuantSpec(portable=True, **POWER)], ids=str)
    def test_calibrated(self, denoiser, scales, bound, spec):
        model = quantize_model(denoiser.copy(), spec, scales)
        assert denoiser.sqnr_db(model) > bound[8]

    def test_data_free(self, denoiser, bound):
        model = quantize_model(denoiser.copy(), QuantSpec(**POWER))
        assert denoiser.sqnr_db(model) > bound[8] - 3

    @pytest.mark.parametrize("weight_bits", [6, 4])
    def test_fewer_weight_bits(self, denoiser, scales, bound, weight_bits):
        model = quantize_model(denoiser.copy(), QuantSpec(weight_bits=weight_bits), scales)
        assert bound[weight_bits] < denoiser.sqnr_db(model) < bound[8] + 20

    @pytest.mark.parametrize("denoiser", ["wan"], indirect=True)
    def test_calibration_pays(self, denoiser, scales):
        """Static, where it matters: the calibrated transform against the same ranges without it."""
        with_transform = denoiser.sqnr_db(quantize_model(denoiser.copy(), STATIC, scales))
        without = denoiser.sqnr_db(quantize_model(denoiser.copy(), replace(STATIC, shift=False, scale="none"), scales))
        assert with_transform > without + 1

    def test_dequantized_is_close_to_the_original(self, denoiser, scales, bound):
        model = dequantize_model(quantize_model(denoiser.copy(), QuantSpec(), scales))
        assert not [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
        assert denoiser.sqnr_db(model) > bound[8]
        original = denoiser.model.state_dict()
        assert model.state_dict().keys() >= original.keys()  # and the biases that the fold brought
        for key, tensor in original.items():
            found = model.state_dict()[key]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            if tensor.dim() > 1:
                assert (found - tensor).abs().max() <= 0.05 * tensor.abs().max(), key


class TestResult:
    def test_in_place_with_exactly_the_planned_layers(self, denoiser, scales):
        model = denoiser.copy()
        plan = plan_layers(model, STATIC, scales)
        assert quantize_model(model, STATIC, scales) is model
        quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
        assert quantized.keys() == plan.keys()
        for name, layer in quantized.items():
            assert set(layer.state_dict()) - {"boundaries", "offset", "gain", "levels"} == {
                "weight",
                "weight_scale",
                *plan[name].tensors,
            } - {"codebook"}
            assert hasattr(layer, "levels") == (plan[name].kind == "temporal")
        assert not [key for key, tensor in model.state_dict().items() if tensor.is_meta]
        untouched = denoiser.model.state_dict()
        for key, tensor in model.state_dict().items():
            if key.rpartition(".")[0] not in plan:
                assert torch.equal(tensor, untouched[key]), key

    def test_the_spec_of_the_scales_is_the_default(self, wan, wan_scales):
        scales = replace(wan_scales, spec=QuantSpec(weight_bits=5))
        model = quantize_model(wan.copy(), scales=scales)
        assert model.blocks[0].attn1.to_q.spec.weight_bits == 5

    def test_shared_transforms_own_their_memory(self, wan, wan_scales):
        attention = quantize_model(wan.copy(), None, wan_scales).blocks[0].attn1
        assert torch.equal(attention.to_q.input_shift, attention.to_k.input_shift)
        attention.to_q.input_shift += 1
        assert not torch.equal(attention.to_q.input_shift, attention.to_k.input_shift)
        assert torch.equal(attention.to_k.input_shift, wan_scales.layers["blocks.0.attn1.to_k"].input_shift)

    @pytest.mark.parametrize(
        ("settings", "shifted", "scaled"),
        [({}, True, True), ({"shift": False}, False, True), ({"scale": "none"}, True, False)],
    )
    def test_the_spec_may_take_less_than_the_scales_hold(self, wan, wan_scales, settings, shifted, scaled):
        model = quantize_model(wan.copy(), QuantSpec(**settings), wan_scales)
        layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
        assert any(layer.input_shift is not None for layer in layers) == shifted
        assert any(layer.input_scale is not None for layer in layers) == scaled
        assert wan.sqnr_db(model) > 50

    def test_a_transform_that_does_nothing_is_not_stored(self, wan, wan_scales):
        name = "blocks.0.attn1.to_out.0"
        layer = wan_scales.layers[name]
        plain = replace(layer, input_shift=torch.zeros_like(layer.input_shift), input_scale=layer.input_scale + 1)
        scales = replace(wan_scales, layers={**wan_scales.layers, name: plain})
        converted = quantize_model(wan.copy(), None, scales).get_submodule(name)
        assert converted.input_shift is None and converted.input_scale is not None

    def test_training_mode_and_grad(self, wan):
        model = quantize_model(wan.copy().train(), QuantSpec(temporal="none"))
        assert all(module.training for module in model.modules())
        assert all(
            not parameter.requires_grad
            for layer in model.modules()
            if isinstance(layer, QuantizedLayer)
            for parameter in layer.parameters()
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_models(self, wan, wan_scales, dtype):
        """Scales of the float32 model fit its 16-bit version; its output type stays."""
        model = quantize_model(wan.copy().to(dtype), None, wan_scales)
        layer = model.blocks[0].attn1.to_q
        assert layer.bias.dtype == dtype and layer.weight_scale.dtype == torch.float32
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 1, 4, 4, generator=generator)
        text = torch.randn(1, 3, 32, generator=generator)
        with torch.no_grad():
            out = model(latents.to(dtype), torch.tensor([500]), text.to(dtype)).sample
            expected = wan.model(latents, torch.tensor([500]), text).sample
        assert out.dtype == dtype
        assert 10 * torch.log10(expected.square().sum() / (out.float() - expected).square().sum()) > 25

    def test_state_dict_moves_to_an_empty_skeleton(self, unet, unet_scales):
        """Plan, skeleton, checkpoint: the reloaded model is the same bit for bit."""
        model = quantize_model(unet.copy(), STATIC, unet_scales)
        plan = plan_layers(unet.model, STATIC, unet_scales)
        skeleton = install_layers(unet.copy(), plan, STATIC, torch.float32)
        skeleton.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(unet.sample(skeleton), unet.sample(model))


class TestDataFreeTemporal:
    def test_needs_no_forward_pass(self, denoiser):
        model = denoiser.copy()
        model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
        layers = temporal_layers(quantize_model(model, QuantSpec(**POWER)))
        assert layers
        for layer in layers:
            assert layer.levels.isfinite().all() and (layer.levels.diff() >= 0).all()
            assert torch.equal(layer.levels, layers[0].levels)

    def test_later_for_a_model_that_was_loaded_empty(self, wan):
        expected = quantize_model(wan.copy(), QuantSpec(**POWER))
        state = {key: tensor for key, tensor in expected.state_dict().items() if "levels" not in key}
        codebook = ("levels", "boundaries", "offset", "gain")
        state = {key: tensor for key, tensor in state.items() if not key.endswith(codebook)}
        spec = QuantSpec(**POWER)
        model = install_layers(wan.copy(), plan_layers(wan.model, spec), spec, torch.float32)
        model.load_state_dict(state, assign=True, strict=False)
        (layer,) = temporal_layers(model)
        assert layer.levels.is_meta
        fit_temporal_layers(model, spec)
        assert not layer.levels.is_meta and wan.sqnr_db(model) > 50
        before = layer.levels.clone()
        fit_temporal_layers(model, QuantSpec(temporal_quantizer="uniform"))  # what is filled stays
        assert torch.equal(layer.levels, before)

    def test_modes(self, wan):
        outputs = {}
        for mode in ("table", "online", "none"):
            model = quantize_model(wan.copy(), QuantSpec(temporal=mode, **POWER))
            (layer,) = temporal_layers(model)
            assert (layer.levels is None) == (mode == "none")
            outputs[mode] = wan.sample(model)
        torch.testing.assert_close(outputs["table"], outputs["online"], rtol=1e-2, atol=1e-2)
        assert not torch.equal(outputs["table"], outputs["none"])


class TestNothingHalfChanged:
    def refuses(self, model, spec, scales, message, unchanged):
        same = unchanged(model)
        with pytest.raises(QVDError, match=message):
            quantize_model(model, spec, scales)
        assert same()

    def test_nan_in_the_last_weight(self, denoiser, scales, unchanged):
        model = denoiser.copy()
        last = list(plan_layers(model, QuantSpec()))[-1]
        model.get_submodule(last).weight.data.view(-1)[-1] = torch.nan
        for used in (None, scales):
            self.refuses(model, QuantSpec(), used, "holds NaN or infinity", unchanged)

    def test_nan_in_a_bias(self, wan, unchanged):
        model = wan.copy()
        model.blocks[1].ffn.net[2].bias.data[0] = torch.inf
        self.refuses(model, QuantSpec(), None, r"blocks\.1\.ffn\.net\.2\.bias holds", unchanged)

    def test_nan_in_the_timestep_embedding(self, wan, unchanged):
        """No quantized layer, but data-free HTDQ reads it."""
        model = wan.copy()
        model.condition_embedder.time_embedder.linear_2.weight.data[0, 0] = torch.nan
        self.refuses(model, QuantSpec(), None, "NaN", unchanged)

    def test_scales_of_other_weights(self, wan, wan_scales, unchanged):
        model = wan.copy()
        model.blocks[1].ffn.net[2].weight.data.normal_()
        self.refuses(model, None, wan_scales, r"weights of layer blocks\.1\.ffn\.net\.2 differ", unchanged)

    def test_scales_of_another_model(self, unet, wan_scales, unchanged):
        self.refuses(unet.copy(), None, wan_scales, "another model", unchanged)

    def test_static_without_scales(self, wan, unchanged):
        self.refuses(wan.copy(), QuantSpec(activation="static"), None, "needs calibrated scales", unchanged)

    def test_twice(self, wan, unchanged):
        model = quantize_model(wan.copy(), QuantSpec(temporal="none"))
        self.refuses(model, QuantSpec(), None, "quantized already", unchanged)

    def test_scales_are_not_changed_either(self, wan, wan_scales):
        before = copy.deepcopy(wan_scales)
        quantize_model(wan.copy(), STATIC, wan_scales)
        for name, layer in before.layers.items():
            after = wan_scales.layers[name]
            assert all(torch.equal(tensor, getattr(after, key)) for key, tensor in layer.tensors().items())
            assert layer.settings() == after.settings()

    @pytest.mark.parametrize(
        "plan",
        [{"blocks.9.missing": LayerPlan("linear")}, {"blocks.0.attn1.to_q": LayerPlan("conv2d")}],
        ids=["missing", "kind"],
    )
    def test_a_plan_of_another_model(self, wan, plan, unchanged):
        model = wan.copy()
        same = unchanged(model)
        with pytest.raises(QVDError, match="belongs to another model"):
            install_layers(
                model, {"blocks.0.attn1.to_k": LayerPlan("linear", ("bias",))} | plan, QuantSpec(), torch.float32
            )
        assert same()


def test_float_weights_leave_memory_one_by_one(wan, wan_scales, monkeypatch):
    """At no time are both models in memory: what is quantized already is not held by anyone."""
    quantized_layer = convert.quantized_layer
    weights: list[weakref.ref[Tensor]] = []

    def watched(name, source, encoding):
        assert not any(weight() is not None for weight in weights)
        weights.append(weakref.ref(source.weight))
        return quantized_layer(name, source, encoding)

    monkeypatch.setattr(convert, "quantized_layer", watched)
    quantize_model(wan.copy(), STATIC, wan_scales)
    assert len(weights) > 10
