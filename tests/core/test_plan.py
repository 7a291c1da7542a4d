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

from qvd_core import QuantSpec, QVDError, calibrate_model, quantize_model
from qvd_core.plan import LayerPlan, plan_from_dict, plan_layers, plan_to_dict, refuse_quantized
from tests.core.video_clock import with_buckets, with_frames


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
            (QuantSpec(portable=True, bias_correction=False), ("bias",)),  # a producer's shift comes back as a bias
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

    @pytest.mark.parametrize(
        ("spec", "setting"),
        [
            (QuantSpec(activation="static_bucket"), "static_bucket"),
            (QuantSpec(activation="static_frame"), "static_frame"),
            (QuantSpec(rounding="gptq"), 'rounding="gptq"'),
            (QuantSpec(auto_keep=0.1), "auto_keep=0.1"),
        ],
    )
    def test_settings_that_need_scales(self, wan, spec, setting):
        with pytest.raises(QVDError, match=f"{setting}.* needs calibrated scales"):
            plan_layers(wan.model, spec)

    def test_gptq_with_scales_without_samples(self, wan, wan_scales):
        with pytest.raises(QVDError, match="hold no samples"):
            plan_layers(wan.model, QuantSpec(rounding="gptq"), wan_scales)

    def test_auto_keep_with_scales_that_measured_nothing(self, wan, wan_scales):
        with pytest.raises(QVDError, match="do not say how sensitive"):
            plan_layers(wan.model, QuantSpec(auto_keep=0.1), wan_scales)

    @pytest.mark.parametrize(
        ("field", "value"), [("input_shift", torch.nan), ("static_step", torch.nan), ("static_step", 0.0)]
    )
    def test_scales_with_values_no_calibration_finds(self, wan, wan_scales, field, value):
        name = "blocks.0.attn1.to_q"
        layer = wan_scales.layers[name]
        bad = replace(layer, **{field: torch.full_like(getattr(layer, field), value)})
        with pytest.raises(QVDError, match=rf"damaged .*{name}\.{field}"):
            plan_layers(wan.model, QuantSpec(), replace(wan_scales, layers=wan_scales.layers | {name: bad}))

    def test_samples_of_another_width(self, wan, wan_scales):
        name = "blocks.0.attn1.to_q"
        layers = wan_scales.layers | {name: replace(wan_scales.layers[name], rows_of=name)}
        scales = replace(wan_scales, layers=layers, rows={name: torch.zeros(4, 64).bfloat16()})
        with pytest.raises(QVDError, match=rf"sample of layer {name} has 64 columns"):
            plan_layers(wan.model, QuantSpec(4), scales)

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


class TestSteps:
    """How many static scales a layer gets, and what tells them apart."""

    def test_as_many_buckets_as_were_calibrated(self, wan, wan_scales):
        scales = with_buckets(wan_scales, (0.5, 1.0, 0.7), (200.0, 700.0))
        layer = plan_layers(wan.model, QuantSpec(activation="static_bucket"), scales)["blocks.0.attn1.to_q"]
        assert (layer.steps, layer.steps_by) == (3, "timestep") and "activation_scale" in layer.tensors

    @pytest.mark.parametrize(("buckets", "expected"), [(1, (1, "layer")), (2, (2, "timestep")), (9, (3, "timestep"))])
    def test_never_more_than_the_spec_allows(self, wan, wan_scales, buckets, expected):
        scales = with_buckets(wan_scales, (0.5, 1.0, 0.7), (200.0, 700.0))
        spec = QuantSpec(activation="static_bucket", buckets=buckets)
        layer = plan_layers(wan.model, spec, scales)["blocks.0.attn1.to_q"]
        assert (layer.steps, layer.steps_by) == expected
        held = quantize_model(wan.copy(), spec, scales).get_submodule("blocks.0.attn1.to_q")
        assert held.activation_scale.shape == (expected[0],)

    def test_one_bucket_is_a_static_layer(self, wan, wan_scales):
        scales = with_buckets(wan_scales, (1.0,), ())
        spec = QuantSpec(activation="static_bucket")
        assert plan_layers(wan.model, spec, scales) == plan_layers(
            wan.model, QuantSpec(activation="static"), wan_scales
        )

    def test_scales_that_know_no_timesteps(self, wan, wan_scales):
        name = "blocks.0.attn1.to_q"
        old = replace(wan_scales.layers[name], bucket_steps=None, bucket_boundaries=None)
        scales = replace(wan_scales, layers=wan_scales.layers | {name: old})
        with pytest.raises(QVDError, match=rf"{name} know nothing of timesteps"):
            plan_layers(wan.model, QuantSpec(activation="static_bucket"), scales)

    def test_frames_where_the_layer_knows_them(self, unet, unet_scales):
        plan = plan_layers(unet.model, QuantSpec(activation="static_frame"), with_frames(unet_scales, (0.5, 1.0)))
        found = {name: (layer.steps, layer.steps_by) for name, layer in plan.items() if layer.kind != "temporal"}
        assert found["down_blocks.1.motion_modules.0.transformer_blocks.0.attn1.to_q"] == (2, "minor")
        assert found["down_blocks.0.resnets.0.conv1"] == (2, "major")
        assert all(
            (steps, by) == (1, "layer")
            for name, (steps, by) in found.items()
            if not unet_scales.layers[name].frame_order
        )

    @pytest.mark.parametrize("activation", ["static", "static_bucket", "static_frame"])
    def test_layers_that_read_the_prompt_are_dynamic(self, wan, wan_scales, activation):
        scales = with_frames(with_buckets(wan_scales, (0.5, 1.0), (500.0,)), (0.5, 1.0, 1.0))
        layer = plan_layers(wan.model, QuantSpec(activation=activation), scales)["blocks.0.attn2.to_k"]
        assert "activation_scale" not in layer.tensors and layer.steps_by == "layer"

    def test_rotation_only_where_it_is_asked_for(self, wan, wan_scales):
        name = "blocks.0.attn1.to_q"
        scales = replace(wan_scales, layers=wan_scales.layers | {name: replace(wan_scales.layers[name], rotation=32)})
        assert plan_layers(wan.model, QuantSpec(rotate=True), scales)[name].rotation == 32
        assert plan_layers(wan.model, QuantSpec(), scales)[name].rotation == 0
        assert plan_layers(wan.model, QuantSpec(rotate=True, portable=True), scales)[name].rotation == 0


class TestDictForm:
    @pytest.mark.parametrize(
        ("layer", "written"),
        [
            (LayerPlan("linear", ("bias",)), ["linear", "bias"]),
            (
                LayerPlan("linear", ("activation_scale",), 8, "timestep", 64),
                ["linear", "activation_scale", "steps:8:timestep", "rotation:64"],
            ),
            (LayerPlan("conv2d", ("activation_scale",), 21, "minor"), ["conv2d", "activation_scale", "steps:21:minor"]),
        ],
    )
    def test_written_form(self, layer, written):
        assert plan_to_dict({"a": layer}) == {"a": written} and plan_from_dict({"a": written}) == {"a": layer}

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
            {"a": ["conv4d"]},
            {"a": [["linear"]]},
            {"a": ["linear", "weight"]},
            {"a": ["linear", ["bias"]]},
            {"a": ["linear", None]},
            {"a": ["linear", "steps:1:timestep"]},
            {"a": ["linear", "steps:8:layer"]},
            {"a": ["linear", "steps:8:fortnight"]},
            {"a": ["linear", "steps:8"]},
            {"a": ["linear", "steps:-8:major"]},
            {"a": ["linear", "steps:9999:major"]},
            {"a": ["linear", "steps:99999999999999999999:major"]},
            {"a": ["linear", "steps:\u0663:major"]},
            {"a": ["linear", "rotation:0"]},
            {"a": ["linear", "rotation:1"]},
            {"a": ["linear", "rotation:48"]},
            {"a": ["linear", "rotation:8192"]},
            {"a": ["linear", "rotation:64:major"]},
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


def test_fused_projections_are_refused(wan):
    """`to_q` beside a fused `to_qkv` is dead weight: quantizing or folding it changes nothing, or the wrong thing."""
    model = wan.copy()
    for block in model.blocks:
        block.attn1.fuse_projections()
    with pytest.raises(QVDError, match=r"attn1 .* fused projections: call unfuse_qkv_projections"):
        plan_layers(model, QuantSpec())
    with pytest.raises(QVDError, match="fused projections"):
        calibrate_model(model, lambda: None)
