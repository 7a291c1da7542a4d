"""Encoding: one layer at a time, in any order, gives what quantizing the whole model gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, Scales, quantize_model
from qvd_core.convert import fill_layer
from qvd_core.encode import Encoding, encode_layer
from qvd_core.fingerprint import weight_probe
from qvd_core.plan import LayerPlan
from qvd_core.scales import LayerScales
from qvd_core.steps import reach
from qvd_core.transform import Transform
from tests.core.video_clock import with_buckets, with_frames

STATIC = ("bias", "input_shift", "input_scale", "activation_scale")


class TestOrder:
    @pytest.mark.parametrize(
        "spec",
        [QuantSpec(), QuantSpec(activation="static_bucket"), QuantSpec(weight_bits=4, activation="static_frame")],
        ids=["token", "bucket", "W4-frame"],
    )
    def test_layers_encoded_backwards_are_those_of_the_model(self, wan, wan_scales, spec):
        scales = with_frames(with_buckets(wan_scales, (0.5, 1.0), (400.0,)), (0.5, 1.0, 0.8))
        encoding = Encoding.of(wan.model, spec, scales)
        expected = quantize_model(wan.copy(), spec, scales).state_dict()
        for name in reversed(list(encoding.plan)):
            layer = wan.model.get_submodule(name)
            for key, tensor in encoding.encode(name, layer.weight.detach(), layer.bias.detach()).items():
                assert torch.equal(tensor.to(expected[f"{name}.{key}"].dtype), expected[f"{name}.{key}"]), (name, key)

    def test_the_plan_needs_only_a_skeleton(self, wan, wan_scales):
        skeleton = wan.copy().to("meta")
        spec = QuantSpec(activation="static", portable=True)
        one, two = (Encoding.of(model, spec, wan_scales) for model in (wan.model, skeleton))
        assert one.plan == two.plan and one.edits.keys() == two.edits.keys()

    def test_every_tensor_owns_its_memory(self, wan, wan_scales):
        """q, k and v share one transform; a file refuses tensors that share memory."""
        encoding = Encoding.of(wan.model, QuantSpec(activation="static"), wan_scales)
        held = []
        for name in ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v"):
            layer = wan.model.get_submodule(name)
            held += encoding.encode(name, layer.weight.detach(), layer.bias.detach()).values()
        assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == len(held) == 3 * 6

    @pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
    @pytest.mark.parametrize("which", ["weight", "bias"])
    def test_bad_weights_are_named(self, wan, wan_scales, which, bad):
        encoding = Encoding.of(wan.model, QuantSpec(), wan_scales)
        tensors = {"weight": torch.zeros(32, 32), "bias": torch.zeros(32)}
        tensors[which].view(-1)[3] = bad
        with pytest.raises(QVDError, match=rf"blocks\.0\.attn1\.to_q\.{which} holds NaN or infinity"):
            encoding.encode("blocks.0.attn1.to_q", **tensors)

    def test_weights_of_another_model_are_refused(self, wan, wan_scales):
        encoding = Encoding.of(wan.model, QuantSpec(), wan_scales)
        with pytest.raises(QVDError, match="calibrated on another"):
            encoding.encode("blocks.0.attn1.to_q", torch.randn(32, 32), torch.zeros(32))

    def test_temporal_layers_whose_codebook_is_to_be_fitted(self, wan, wan_scales):
        name = "condition_embedder.time_proj"
        assert Encoding.of(wan.model, QuantSpec(), None).without_codebook() == [name]
        assert Encoding.of(wan.model, QuantSpec(), wan_scales).without_codebook() == []
        assert Encoding.of(wan.model, QuantSpec(temporal="none"), None).without_codebook() == []


def calibrated(rotation: int = 0) -> LayerScales:
    generator = torch.Generator().manual_seed(0)
    low = -torch.rand(8, generator=generator) * 5
    high = torch.rand(8, generator=generator) * 9
    shift, scale = (high + low) / 2, torch.rand(8, generator=generator) + 0.5
    return LayerScales(
        low,
        high,
        (high + low) / 3,
        shift,
        scale,
        torch.zeros(0),
        static_step=torch.tensor([0.04]),
        bucket_steps=torch.tensor([0.01, 0.04]),
        bucket_boundaries=torch.tensor([300.0]),
        frame_steps=torch.tensor([0.04, 0.02, 0.03]),
        frame_order="major",
        rotation=rotation,
    )


def encode(
    plan: LayerPlan, spec: QuantSpec, searched: QuantSpec | None = None, **arguments: object
) -> dict[str, Tensor]:
    layer = nn.Linear(8, 4)
    scales = Scales("M", "0", searched or spec, layers={"layer": calibrated(plan.rotation)})
    return encode_layer("layer", plan, layer.weight.detach(), layer.bias.detach(), spec, scales, **arguments)  # type: ignore[arg-type]


class TestSteps:
    spec = QuantSpec(activation="static")

    def test_the_searched_step_belongs_to_the_searched_transform(self):
        assert encode(LayerPlan("linear", STATIC), self.spec)["activation_scale"].tolist() == pytest.approx([0.04])

    @pytest.mark.parametrize("bits", [4, 6])
    def test_other_bits_cover_the_same_range(self, bits):
        found = encode(LayerPlan("linear", STATIC), QuantSpec(8, bits, activation="static"), self.spec)
        limit = 2 ** (bits - 1) - 1
        assert float(found["activation_scale"]) * limit == pytest.approx(0.04 * 127)

    @pytest.mark.parametrize("missing", ["input_shift", "input_scale"])
    def test_another_transform_gets_the_range_seen(self, missing):
        """The searched share of the range says nothing about an input that is not shifted, or not scaled."""
        plan = LayerPlan("linear", tuple(tensor for tensor in STATIC if tensor != missing))
        found, held = encode(plan, self.spec), calibrated()
        shift = torch.zeros(8) if missing == "input_shift" else held.input_shift
        scale = torch.ones(8) if missing == "input_scale" else held.input_scale
        expected = reach(held.input_min, held.input_max, Transform("", shift, scale)) / 127
        assert float(found["activation_scale"]) == pytest.approx(float(expected)) and missing not in found

    def test_an_input_its_producer_transforms(self):
        plan = LayerPlan("linear", ("bias", "activation_scale"))
        held = calibrated()
        shift_only = Transform("f", held.input_shift, torch.ones(8))
        found = encode(plan, self.spec, folded=shift_only)
        expected = reach(held.input_min, held.input_max, shift_only) / 127
        assert float(found["activation_scale"]) == pytest.approx(float(expected))
        whole = encode(plan, self.spec, folded=Transform("f", held.input_shift, held.input_scale))
        assert float(whole["activation_scale"]) == pytest.approx(0.04)

    def test_per_timestep(self):
        plan = LayerPlan("linear", STATIC, 2, "timestep")
        found = encode(plan, replace(self.spec, activation="static_bucket"))
        assert found["activation_scale"].tolist() == pytest.approx([0.01, 0.04])
        assert found["bucket_boundaries"].tolist() == [300.0]

    def test_per_timestep_at_other_bits(self):
        plan = LayerPlan("linear", STATIC, 2, "timestep")
        bucket = replace(self.spec, activation="static_bucket")
        found = encode(plan, replace(bucket, activation_bits=6), bucket)["activation_scale"]
        assert found.tolist() == pytest.approx([0.01 * 127 / 31, 0.04 * 127 / 31])

    def test_per_frame_with_another_transform_keeps_the_proportions(self):
        plan = LayerPlan("linear", ("bias", "activation_scale"), 3, "major")
        found = encode(plan, replace(self.spec, activation="static_frame"))["activation_scale"]
        assert (found / found[0]).tolist() == pytest.approx([1.0, 0.5, 0.75])

    def test_scales_of_version_1_know_only_the_range(self):
        held = calibrated()
        old = replace(
            held, static_step=None, bucket_steps=None, bucket_boundaries=None, frame_steps=None, frame_order=""
        )
        layer = nn.Linear(8, 4)
        scales = Scales("M", "0", self.spec, layers={"layer": old})
        found = encode_layer(
            "layer", LayerPlan("linear", STATIC), layer.weight.detach(), layer.bias.detach(), self.spec, scales
        )
        expected = reach(held.input_min, held.input_max, Transform("", held.input_shift, held.input_scale)) / 127
        assert float(found["activation_scale"]) == pytest.approx(float(expected))


class TestWeights:
    def test_a_folded_transform_is_not_carried_but_compensated(self):
        """W diag(s), b + W z: with and without the buffers the weights are the same."""
        layer, held = nn.Linear(8, 4), calibrated()
        scales = Scales("M", "0", QuantSpec(), layers={"layer": held})
        arguments = (layer.weight.detach(), layer.bias.detach(), QuantSpec(), scales)
        carried = encode_layer("layer", LayerPlan("linear", STATIC[:3]), *arguments)
        folded = encode_layer(
            "layer",
            LayerPlan("linear", ("bias",)),
            *arguments,
            folded=Transform("f", held.input_shift, held.input_scale),
        )
        for key in ("weight", "weight_scale", "bias"):
            assert torch.equal(carried[key], folded[key])
        assert folded.keys() == {"weight", "weight_scale", "bias"}

    def test_four_bits_are_packed_but_not_in_temporal_layers(self):
        layer = nn.Linear(9, 4)
        for kind, dtype, columns in (("linear", torch.uint8, 5), ("temporal", torch.int8, 9)):
            found = encode_layer("layer", LayerPlan(kind), layer.weight.detach(), None, QuantSpec(4))
            assert found["weight"].dtype == dtype and found["weight"].shape == (4, columns)

    def test_a_bias_that_float16_cannot_hold_is_refused_before_anything_changes(self):
        """W z of 100 inputs that lie at 1000 is 1e5; float16 ends at 65504."""
        layer = nn.Linear(8, 4, dtype=torch.float16)
        layer.weight.data.fill_(12.5)
        shifted = replace(calibrated(), input_shift=torch.full((8,), 1000.0))
        shifted = replace(shifted, weight_probe=weight_probe(layer.weight))
        scales = Scales("M", "0", QuantSpec(), layers={"layer": shifted})
        encoding = Encoding({"layer": LayerPlan("linear", STATIC[:3])}, QuantSpec(), scales)
        with pytest.raises(QVDError, match=r"layer into its bias leaves the range of torch\.float16"):
            encoding.check("layer", layer.weight.detach(), layer.bias.detach())
        encoding.check("layer", layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16())

    def test_a_bias_that_overflows_only_when_it_is_cast_is_refused_too(self, wan, wan_scales):
        """Loaders read float32 files into float16 models: the weight alone says nothing of the bias' type."""
        layer = quantize_model(wan.copy(), QuantSpec(), wan_scales).get_submodule("blocks.0.ffn.net.2").half()
        with pytest.raises(QVDError, match="bias of the quantized model leaves the range of float16"):
            fill_layer(layer, {"bias": torch.full((32,), 7e4)})
