"""`portable=True`: shift and scale move into producers; the model needs nothing that a plain int8 loader lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNetMotionModel, WanTransformer3DModel
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, Scales, quantize_model
from qvd_core.families import find_family
from qvd_core.folds import fold_sites
from qvd_core.layers import QuantizedLayer
from qvd_diffusers import QVDConfig
from tests.core.conftest import Denoiser

SPECS = {
    "wan": QuantSpec(portable=True, temporal_quantizer="power"),
    "unet": QuantSpec(portable=True, scale="smooth", temporal_quantizer="power"),
}
CLASSES: dict[str, type[nn.Module]] = {"wan": WanTransformer3DModel, "unet": UNetMotionModel}


def with_transforms(model: nn.Module, scales: Scales, shift: float = 0.3, spread: float = 0.3) -> Scales:
    """The same scales with a strong random transform for every group of layers that read one input."""
    generator = torch.Generator().manual_seed(0)
    family = find_family(model)
    drawn: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {}
    for name, layer in scales.layers.items():
        group, channels = family.input_group(name), len(layer.input_shift)
        if group not in drawn:
            scale = (spread * torch.randn(channels, generator=generator)).exp()
            drawn[group] = (shift * torch.randn(channels, generator=generator), scale)
        layers[name] = replace(
            layer, input_shift=drawn[group][0], input_scale=drawn[group][1], rotation=0, static_step=None,
            bucket_steps=None, bucket_boundaries=None, frame_steps=None,
        )  # fmt: skip
    return replace(scales, layers=layers)


def buffers(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_buffers()}


def carries_nothing(model: nn.Module) -> bool:
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
    return bool(layers) and all(
        layer.input_shift is None and layer.input_scale is None and layer.plan.rotation == 0 for layer in layers
    )


def float_changes(denoiser: Denoiser, model: nn.Module) -> set[str]:
    """Parameters outside quantized layers that are no longer what they were."""
    before = dict(denoiser.model.named_parameters())
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    return {
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in quantized and not torch.equal(parameter, before[name])
    }


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["denoiser"]


@pytest.fixture(scope="module")
def portable_scales(wan: Denoiser, unet: Denoiser) -> Callable[[str], Scales]:
    """Calibrated for portable use, once per model."""
    found: dict[str, Scales] = {}

    def get(name: str) -> Scales:
        if name not in found:
            found[name] = {"wan": wan, "unet": unet}[name].calibrate(SPECS[name])
        return found[name]

    return get


class TestCalibrated:
    def test_transforms_fold_completely(self, denoiser, name, portable_scales):
        """The search only judges what the producer can take: nothing is found that is then dropped."""
        scales = portable_scales(name)
        sites = {}
        for site in fold_sites(denoiser.model, find_family(denoiser.model)):
            sites.update(dict.fromkeys(site.consumers, site))
        for layer, held in scales.layers.items():
            if layer not in sites:
                assert not held.input_shift.any() and bool((held.input_scale == 1).all()), layer
            else:
                assert sites[layer].shift or not held.input_shift.any()
                assert sites[layer].scale or bool((held.input_scale == 1).all())
            assert held.rotation == 0

    def test_nothing_is_left_to_do_at_run_time(self, denoiser, name, portable_scales):
        model = quantize_model(denoiser.copy(), SPECS[name], portable_scales(name))
        assert carries_nothing(model)
        assert not buffers(model) & {"input_shift", "input_scale"}
        plain = quantize_model(denoiser.copy(), replace(SPECS[name], portable=False), portable_scales(name))
        assert denoiser.sqnr_db(model) > denoiser.sqnr_db(plain) - 3


class TestFolds:
    """Scales with strong transforms, calibrated without a thought of portability."""

    def scales_of(self, request: pytest.FixtureRequest, denoiser: Denoiser, name: str) -> Scales:
        return with_transforms(denoiser.model, request.getfixturevalue(f"{name}_scales"))

    def test_only_the_part_that_folds_is_used(self, request, denoiser, name):
        scales = self.scales_of(request, denoiser, name)
        model = quantize_model(denoiser.copy(), SPECS[name], scales)
        assert carries_nothing(model) and not buffers(model) & {"input_shift", "input_scale"}
        changed = float_changes(denoiser, model)
        expected = {"wan": "scale_shift_table", "unet": "norm1.bias"}[name]
        assert any(each.endswith(expected) for each in changed)
        assert denoiser.sqnr_db(model) > 25  # a fold on one side alone would leave almost nothing of the output

    def test_the_float_parameters_edited_are_those_of_the_sites(self, request, denoiser, name):
        scales = self.scales_of(request, denoiser, name)
        model = quantize_model(denoiser.copy(), SPECS[name], scales)
        slots = {slot.tensor for site in fold_sites(denoiser.model, find_family(denoiser.model)) for slot in site.slots}
        assert float_changes(denoiser, model) <= slots

    def test_without_shift_or_scale_only_the_other_folds(self, request, denoiser, name):
        scales = self.scales_of(request, denoiser, name)
        neither = replace(SPECS[name], shift=False, scale="none")
        assert not float_changes(denoiser, quantize_model(denoiser.copy(), neither, scales))
        unscaled = quantize_model(denoiser.copy(), replace(SPECS[name], scale="none"), scales)
        changed = float_changes(denoiser, unscaled)
        assert changed and not any(each.endswith(("norm1.weight", "norm2.weight")) for each in changed)
        assert denoiser.sqnr_db(unscaled) > 25

    def test_static_steps_are_those_of_the_folded_input(self, request, denoiser, name):
        scales = self.scales_of(request, denoiser, name)
        model = quantize_model(denoiser.copy(), replace(SPECS[name], activation="static"), scales)
        assert denoiser.sqnr_db(model) > 20

    def test_a_consumer_kept_in_full_precision_keeps_its_input(self, request, denoiser, name):
        scales = self.scales_of(request, denoiser, name)
        kept = {"wan": "blocks.0.attn1.to_q", "unet": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"}[
            name
        ]
        producer = {"wan": "blocks.0.scale_shift_table", "unet": kept.replace("attn1.to_q", "norm1.bias")}[name]
        spec = replace(SPECS[name], modules_to_not_convert=(kept,))
        model = quantize_model(denoiser.copy(), spec, scales)
        before, after = dict(denoiser.model.named_parameters())[producer], dict(model.named_parameters())[producer]
        rows = after.flatten(0, -2)[0] if after.dim() > 1 else after
        assert torch.equal(rows, before.flatten(0, -2)[0] if before.dim() > 1 else before)
        assert denoiser.sqnr_db(model) > 25

    def test_loading_through_diffusers_gives_the_same_model(self, request, denoiser, name, tmp_path):
        """Tensor by tensor in any order, against all at once in place."""
        scales = self.scales_of(request, denoiser, name)
        expected = quantize_model(denoiser.copy(), SPECS[name], scales)
        denoiser.model.save_pretrained(tmp_path / "float")
        config = QVDConfig(**{**SPECS[name].to_dict(), "scales": scales})
        model = CLASSES[name].from_pretrained(Path(tmp_path / "float"), quantization_config=config)
        one, two = expected.state_dict(), model.state_dict()
        assert one.keys() == two.keys()
        for key in one:
            assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key
        model.save_pretrained(tmp_path / "quantized")
        again = CLASSES[name].from_pretrained(Path(tmp_path / "quantized"))
        assert torch.equal(denoiser.sample(again), denoiser.sample(expected))


def test_a_fold_that_overflows_is_one_error_and_changes_nothing(wan, wan_scales, unchanged):
    name = "blocks.1.attn2.to_q"
    model = wan.copy().half()
    model.blocks[1].norm2.weight.data.fill_(1000.0)
    small = replace(
        wan_scales.layers[name], input_shift=torch.zeros(32), input_scale=torch.full((32,), 1e-3), rotation=0
    )
    scales = replace(wan_scales, layers=wan_scales.layers | {name: small})
    same = unchanged(model)
    with pytest.raises(QVDError, match=r"blocks\.1\.norm2\.weight leaves the range of torch\.float16") as caught:
        quantize_model(model, SPECS["wan"], scales)
    assert "portable=False" in str(caught.value) and same()
    quantize_model(model, replace(SPECS["wan"], portable=False), scales)
