"""Plans: which layers become what, and every model or pair of model and scales that is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qvd_core import QuantSpec, QVDError
from qvd_core.plan import LayerPlan, plan_from_dict, plan_layers, plan_to_dict, refuse_quantized


class Denoiser(nn.Sequential):
    """No family knows it: the generic rule, first and last kept."""


def generic_model() -> Denoiser:
    return Denoiser(*(nn.Linear(64, 64, bias=index != 2) for index in range(5)))


class FakeQuantized(torch.Tensor):
    """Stands for another backend's tensor subclass."""


class TestKinds:
    def test_wan_without_scales(self, wan):
        plan = plan_layers(wan.model, QuantSpec())
        temporal = plan.pop("condition_embedder.time_proj")
        assert temporal == LayerPlan("temporal", ("bias", "codebook"))
        assert set(plan.values()) == {LayerPlan("linear", ("bias",))}

    def test_unet_without_scales(self, unet):
        plan = plan_layers(unet.model, QuantSpec(temporal="none"))
        assert {layer.kind for layer in plan.values()} == {"linear", "conv2d", "temporal"}
        assert not [name for name, layer in plan.items() if "codebook" in layer.tensors]
        modules = dict(unet.model.named_modules())
        for name, layer in plan.items():
            assert isinstance(modules[name], nn.Conv2d if layer.kind == "conv2d" else nn.Linear)
            assert ("bias" in layer.tensors) == (modules[name].bias is not None)

    @pytest.mark.parametrize(
        ("spec", "tensors"),
        [
            (QuantSpec(), ("bias", "input_shift", "input_scale")),
            (QuantSpec(activation="static"), ("bias", "input_shift", "input_scale", "activation_scale")),
            (QuantSpec(portable=True), ("bias",)),
            (QuantSpec(portable=True, bias_correction=False), ()),
            (QuantSpec(shift=False, scale="none", bias_correction=False), ()),
            (QuantSpec(shift=False, bias_correction=False), ("bias", "input_scale")),
            (QuantSpec(scale="none", bias_correction=False), ("bias", "input_shift")),
        ],
    )
    def test_tensors_of_a_calibrated_layer_without_bias(self, unet, unet_scales, spec, tensors):
        plan = plan_layers(unet.model, spec, unet_scales)
        unbiased = next(name for name in plan if name.endswith("attn1.to_q"))
        assert unet.model.get_submodule(unbiased).bias is None
        assert plan[unbiased] == LayerPlan("linear", tensors)

    def test_layers_that_read_the_prompt_stay_dynamic(self, denoiser, scales):
        """No calibration foresees a prompt's ranges."""
        plan = plan_layers(denoiser.model, QuantSpec(activation="static"), scales)
        static = {name for name, layer in plan.items() if "activation_scale" in layer.tensors}
        dynamic = {name for name, layer in plan.items() if layer.kind != "temporal"} - static
        assert dynamic and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in dynamic)

    def test_needs_no_weights(self, wan, wan_scales):
        skeleton = copy.deepcopy(wan.model).to("meta")
        assert plan_layers(skeleton, QuantSpec(), wan_scales) == plan_layers(wan.model, QuantSpec(), wan_scales)

    def test_modules_to_not_convert_are_whole_part_prefixes(self, wan):
        every = plan_layers(wan.model, QuantSpec())
        kept = plan_layers(
            wan.model, QuantSpec(modules_to_not_convert=("blocks.1", "blocks.0.attn1.to_q", "blocks.0.at"))
        )
        missing = every.keys() - kept.keys()
        assert missing == {name for name in every if name.startswith("blocks.1.")} | {"blocks.0.attn1.to_q"}

    def test_only_plain_layers_are_taken(self):
        class Special(nn.Linear):
            """May compute something else."""

        model = Denoiser(
            nn.Linear(64, 64),
            Special(64, 64),
            nn.Conv2d(64, 64, 3, groups=64),
            nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
            nn.Conv1d(64, 64, 3),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.Linear(64, 64),
        )
        assert list(plan_layers(model, QuantSpec())) == ["5"]


class TestRefusals:
    def test_int8_parameter(self):
        model = generic_model()
        model[1].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
        model.quantization_method = "bitsandbytes"
        with pytest.raises(QVDError, match=r"quantized already by bitsandbytes \(1.weight"):
            plan_layers(model, QuantSpec())

    def test_float8_parameter(self):
        model = generic_model().to(torch.float8_e4m3fn)
        with pytest.raises(QVDError, match="quantized already"):
            refuse_quantized(model)

    def test_tensor_subclass(self):
        model = generic_model()
        model[3].weight = nn.Parameter(torch.zeros(64, 64).as_subclass(FakeQuantized))
        with pytest.raises(QVDError, match=r"3\.weight is FakeQuantized"):
            plan_layers(model, QuantSpec())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_float_models_pass(self, dtype):
        model = generic_model().to(dtype)
        refuse_quantized(model)
        assert len(plan_layers(model, QuantSpec())) == 3

    @pytest.mark.parametrize("model", [nn.Linear(64, 64), Denoiser(nn.Linear(8, 8)), Denoiser()])
    def test_nothing_to_quantize(self, model):
        with pytest.raises(QVDError, match="no layer that QVD can quantize"):
            plan_layers(model, QuantSpec())

    def test_static_without_scales(self):
        with pytest.raises(QVDError, match="needs calibrated scales"):
            plan_layers(generic_model(), QuantSpec(activation="static"))

    def test_static_with_a_layer_that_never_ran(self, wan, wan_scales):
        layers = {name: layer for name, layer in wan_scales.layers.items() if name != "blocks.0.attn1.to_q"}
        partial = replace(wan_scales, layers=layers)
        with pytest.raises(QVDError, match=r"nothing for layer blocks\.0\.attn1\.to_q"):
            plan_layers(wan.model, QuantSpec(activation="static"), partial)
        assert plan_layers(wan.model, QuantSpec(), partial)["blocks.0.attn1.to_q"] == LayerPlan("linear", ("bias",))

    def test_scales_of_another_structure(self, unet, wan_scales):
        with pytest.raises(QVDError, match="calibrated on another model"):
            plan_layers(unet.model, QuantSpec(), wan_scales)

    def test_scales_with_another_channel_count(self, wan, wan_scales):
        layers = dict(wan_scales.layers) | {"blocks.0.attn1.to_q": wan_scales.layers["blocks.0.ffn.net.2"]}
        with pytest.raises(QVDError, match="64 channels, the layer has 32"):
            plan_layers(wan.model, QuantSpec(), replace(wan_scales, layers=layers))

    def test_codebook_with_another_channel_count(self, wan, wan_scales):
        name = "condition_embedder.time_proj"
        codebook = replace(wan_scales.temporal[name], offset=torch.zeros(3), gain=torch.ones(3))
        with pytest.raises(QVDError, match="3 channels, the layer has 32"):
            plan_layers(wan.model, QuantSpec(), replace(wan_scales, temporal={name: codebook}))

    def test_codebooks_of_other_bits(self, wan, wan_scales):
        with pytest.raises(QVDError, match="8-bit temporal codebooks"):
            plan_layers(wan.model, QuantSpec(activation_bits=6), wan_scales)
        assert plan_layers(wan.model, QuantSpec(activation_bits=6, temporal="none"), wan_scales)


class TestDictForm:
    def test_round_trip_through_json(self, unet, unet_scales):
        plan = plan_layers(unet.model, QuantSpec(activation="static"), unet_scales)
        assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan
        assert list(plan_from_dict(plan_to_dict(plan))) == list(plan)

    @pytest.mark.parametrize(
        "values",
        [
            {"a": []},
            {"a": "linear"},
            {"a": None},
            {"a": ["conv3d"]},
            {"a": [["linear"]]},
            {"a": ["linear", "weight"]},
            {"a": ["linear", ["bias"]]},
            {"a": ["linear", None]},
            ["a"],
            "linear",
            3,
        ],
    )
    def test_hostile_input(self, values):
        with pytest.raises(QVDError, match="damaged, or from a newer QVD"):
            plan_from_dict(values)

    json_values = st.recursive(
        st.none() | st.integers() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3)
    )

    @given(st.dictionaries(st.text(max_size=3), json_values, max_size=3))
    def test_any_json_is_read_or_refused(self, values):
        try:
            assert plan_to_dict(plan_from_dict(values)) == values
        except QVDError as error:
            assert "\n" not in str(error)
