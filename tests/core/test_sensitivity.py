"""Sensitivity: what one quantized layer does to the output is measured, and `auto_keep` acts on it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from qvd_core import QuantSpec, QVDError, Scales, calibrate_model, load_checkpoint, quantize_model, save_checkpoint
from qvd_core.families import find_family
from qvd_core.plan import plan_layers, quantizable_layers
from qvd_core.quality import LARGEST_DECIBELS
from qvd_core.sensitivity import END_EFFECT, end_effects, most_sensitive
from qvd_diffusers import QVDConfig
from tests.core.conftest import Denoiser

ROUGH = QuantSpec(weight_bits=4, shift=False, scale="none", temporal="none", rounding="nearest")
VICTIM = "blocks.1.ffn.net.2"


@pytest.fixture(scope="module")
def broken(wan: Denoiser) -> Denoiser:
    """A Wan with a weight column of 1000 times the others, for a channel that is never used.

    In full precision it does nothing; at 4 bits it sets the step of every output, and all other columns round to zero.
    """
    model = wan.copy()
    *parent, last = VICTIM.split(".")
    block = model.get_submodule(".".join(parent[:2]))
    with torch.no_grad():
        block.ffn.net[0].proj.weight[7] = 0.0
        block.ffn.net[0].proj.bias[7] = 0.0
        block.ffn.net[2].weight *= 3.0
        block.ffn.net[2].weight[:, 7] = 1000.0 * block.ffn.net[2].weight.abs().max()
    return Denoiser(model, wan.forward)


@pytest.fixture(scope="module")
def measured(broken: Denoiser) -> Scales:
    return calibrate_model(broken.model, broken.sample, ROUGH, sensitivity=True)


class TestEndEffects:
    def test_the_broken_layer_ranks_first(self, measured):
        effects = {name: figures[END_EFFECT] for name, figures in measured.report.items()}
        ranked = sorted(effects, key=lambda name: effects[name])
        assert ranked[0] == VICTIM and effects[ranked[1]] > effects[VICTIM] + 6

    def test_of_every_layer_that_would_be_quantized(self, broken, measured):
        layers = quantizable_layers(broken.model, find_family(broken.model), ROUGH)
        effects = {name for name, figures in measured.report.items() if END_EFFECT in figures}
        assert effects == {name for name in layers if name in measured.layers}

    def test_are_what_a_model_with_that_one_layer_gives(self, wan, wan_scales):
        """Against quantizing everything else out of the way, on all calls of a short run."""
        scales = wan.calibrate(QuantSpec(auto_keep=0.5, shift=False, scale="none", temporal_quantizer="power"))
        name = "blocks.0.ffn.net.2"
        others = tuple(other for other in scales.report if other != name)
        spec = replace(scales.spec, auto_keep=None, modules_to_not_convert=others)
        alone = wan.copy()
        plain = replace(scales, spec=spec)
        quantize_model(alone, spec, plain)
        assert scales.report[name][END_EFFECT] == pytest.approx(wan.sqnr_db(alone), abs=0.05)

    def test_steps_that_follow_the_timestep_do_so_here_too(self, wan):
        """Static scales per timestep are measured with the clock running, not at their widest."""
        spec = QuantSpec(activation="static_bucket", shift=False, scale="none", temporal="none", auto_keep=0.5)
        effects = {}
        for activation in ("static", "static_bucket"):
            found = wan.calibrate(replace(spec, activation=activation)).report
            effects[activation] = sum(figures.get(END_EFFECT, 0.0) for figures in found.values())
        assert effects["static_bucket"] >= effects["static"] - 1.0

    def test_only_when_asked_for(self, wan_scales):
        assert not any(END_EFFECT in figures for figures in wan_scales.report.values())

    def test_asked_for_by_auto_keep(self, wan):
        spec = QuantSpec(shift=False, scale="none", temporal="none", auto_keep=0.1)
        found = wan.calibrate(spec)
        assert all(END_EFFECT in found.report[name] for name in found.layers)
        without = calibrate_model(wan.model, wan.sample, spec, sensitivity=False)
        assert not any(END_EFFECT in figures for figures in without.report.values())

    def test_equal_outputs_have_a_finite_figure(self):
        model = nn.Sequential(nn.Linear(4, 4))
        calls = [((torch.randn(2, 4),), {})]
        assert end_effects(model, calls, {"0": lambda: copy.deepcopy(model[0])}) == {"0": LARGEST_DECIBELS}

    def test_the_model_is_left_as_it_was(self, broken, unchanged):
        same = unchanged(broken.model)
        calibrate_model(broken.model, lambda: broken.forward(broken.model, 500.0), ROUGH, sensitivity=True)
        assert same()

    def test_even_when_a_quantized_forward_raises(self, wan, unchanged):
        model = wan.copy()
        same = unchanged(model)

        class Failing(nn.Linear):
            def forward(self, x):
                raise ArithmeticError

        calls = [((), {"hidden_states": torch.zeros(1, 4, 1, 4, 4), "timestep": torch.tensor([5.0])})]
        calls[0][1]["encoder_hidden_states"] = torch.zeros(1, 2, 32)
        with pytest.raises(ArithmeticError):
            end_effects(model, calls, {"blocks.0.attn1.to_q": lambda: Failing(32, 32)})
        assert same()

    def test_even_when_it_is_cancelled(self, wan, unchanged):
        model = wan.copy()
        same = unchanged(model)

        def cancel(done: int, total: int, what: str) -> None:
            if model._forward_pre_hooks:  # only there while effects are measured
                raise InterruptedError

        with pytest.raises(InterruptedError):
            calibrate_model(model, lambda: wan.forward(model, 500.0), ROUGH, progress=cancel, sensitivity=True)
        assert same()


REPORT = {"a": {END_EFFECT: 30.0}, "b": {END_EFFECT: 10.0}, "c": {END_EFFECT: 20.0}, "d": {"sqnr_db": 1.0}}
SIZES = {"a": 10, "b": 30, "c": 10, "d": 50}


class TestMostSensitive:
    @pytest.mark.parametrize(
        ("auto_keep", "kept"),
        [(0.05, []), (0.1, ["c"]), (0.2, ["c", "a"]), (0.3, ["b"]), (0.4, ["b", "c"]), (0.99, ["b", "c", "a"])],
    )
    def test_a_share_of_the_weights(self, auto_keep, kept):
        found = most_sensitive(REPORT, SIZES, auto_keep)
        assert found == kept and sum(SIZES[name] for name in found) <= auto_keep * 100

    @pytest.mark.parametrize(("auto_keep", "kept"), [(1.0, []), (15.0, ["b"]), (20.0, ["b"]), (99, ["b", "c", "a"])])
    def test_a_threshold_in_db(self, auto_keep, kept):
        assert most_sensitive(REPORT, SIZES, auto_keep) == kept

    def test_nothing_measured(self):
        with pytest.raises(QVDError, match="do not say how sensitive"):
            most_sensitive({"a": {"sqnr_db": 3.0}}, {"a": 3}, 0.5)


class TestAutoKeep:
    def test_the_broken_layer_stays_in_full_precision(self, broken, measured):
        everything = plan_layers(broken.model, ROUGH, measured)
        total = sum(broken.model.get_submodule(name).weight.numel() for name in everything)
        size = broken.model.get_submodule(VICTIM).weight.numel()
        spec = replace(ROUGH, auto_keep=1.2 * size / total)
        plan = plan_layers(broken.model, spec, measured)
        kept = everything.keys() - plan.keys()
        assert VICTIM in kept
        assert sum(broken.model.get_submodule(name).weight.numel() for name in kept) <= spec.auto_keep * total
        better = broken.sqnr_db(quantize_model(broken.copy(), spec, measured))
        assert better > broken.sqnr_db(quantize_model(broken.copy(), ROUGH, measured)) + 3

    def test_by_threshold(self, broken, measured):
        effects = {name: measured.report[name][END_EFFECT] for name in measured.layers}
        limit = sorted(effects.values())[3] + 1e-6
        plan = plan_layers(broken.model, replace(ROUGH, auto_keep=limit), measured)
        assert plan.keys() == plan_layers(broken.model, ROUGH, measured).keys() - {
            name for name in effects if effects[name] < limit
        }

    def test_keeping_everything_is_an_error(self, broken, measured, unchanged):
        spec, model = replace(ROUGH, auto_keep=1000.0, modules_to_not_convert=("condition_embedder",)), broken.copy()
        same = unchanged(model)
        with pytest.raises(QVDError, match="would keep every layer"):
            quantize_model(model, spec, measured)
        assert same()

    def test_scales_file_keeps_the_figures(self, measured, tmp_path):
        assert Scales.load(measured.save(tmp_path / "a")).report == measured.report

    def test_checkpoint_round_trip(self, broken, measured, tmp_path):
        model = quantize_model(broken.copy(), replace(ROUGH, auto_keep=0.2), measured)
        again = load_checkpoint(broken.copy(), save_checkpoint(model, tmp_path / "model.safetensors"))
        assert type(again.get_submodule(VICTIM)) is nn.Linear
        assert torch.equal(broken.sample(model), broken.sample(again))

    def test_diffusers_round_trip(self, broken, measured, tmp_path):
        broken.model.save_pretrained(tmp_path / "float")
        spec = replace(ROUGH, auto_keep=0.2)
        config = QVDConfig(
            weight_bits=4,
            shift=False,
            scale="none",
            temporal="none",
            rounding="nearest",
            auto_keep=0.2,
            scales=measured,
        )
        model = WanTransformer3DModel.from_pretrained(Path(tmp_path / "float"), quantization_config=config)
        assert type(model.get_submodule(VICTIM)) is nn.Linear
        model.save_pretrained(tmp_path / "quantized")
        again = WanTransformer3DModel.from_pretrained(Path(tmp_path / "quantized"))
        expected = broken.sample(quantize_model(broken.copy(), spec, measured))
        assert torch.equal(broken.sample(model), expected) and torch.equal(broken.sample(again), expected)


def test_an_output_that_is_not_finite_ranks_first(wan):
    """Overflow is the worst a layer can do; NaN must not hide it from the ranking."""

    def exploding():
        layer = copy.deepcopy(wan.model.get_submodule(VICTIM))
        layer.weight.data.fill_(torch.inf)
        return layer

    call = ((), {"hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([500.0])})
    call[1]["encoder_hidden_states"] = torch.randn(1, 6, 32)
    makers = {VICTIM: exploding, "proj_out": lambda: wan.model.get_submodule("proj_out")}
    effects = end_effects(wan.model, [call], makers)
    assert effects == {VICTIM: -LARGEST_DECIBELS, "proj_out": LARGEST_DECIBELS}
    assert most_sensitive(
        {name: {END_EFFECT: value} for name, value in effects.items()}, dict.fromkeys(effects, 1), 30
    ) == [VICTIM]


def test_a_share_too_small_for_any_sensitive_layer_keeps_none_and_says_so(wan, wan_scales, caplog):
    scales = replace(wan_scales, report={name: {END_EFFECT: 10.0} for name in wan_scales.layers})
    plan = plan_layers(wan.model, QuantSpec(auto_keep=1e-9), scales)
    assert plan.keys() >= wan_scales.layers.keys() and "keeps no layer" in caplog.text
