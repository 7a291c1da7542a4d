"""Calibration: what it sees, what it chooses, and that it leaves the model as it was whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qvd_core import QuantSpec, QVDError, calibrate_model
from qvd_core.families import find_family
from qvd_core.fingerprint import structure_fingerprint
from qvd_core.plan import plan_layers

CHEAP = QuantSpec(shift=False, scale="none", temporal="none")  # no search


class Denoiser(nn.Module):
    """Unknown to every family: four linears, of which the generic rule keeps the first and the last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x, timestep=None, skip=False):
        for index, layer in enumerate(self.layers):
            x = x if skip and index == 2 else layer(x)
        return x


@pytest.fixture
def model() -> Denoiser:
    return Denoiser()


class TestSees:
    def test_every_planned_layer_of_a_video_model(self, denoiser, scales):
        plan = plan_layers(denoiser.model, QuantSpec(), scales)
        temporal = {name for name, layer in plan.items() if layer.kind == "temporal"}
        assert scales.layers.keys() == plan.keys() - temporal and scales.temporal.keys() == temporal
        assert scales.report.keys() == plan.keys()
        assert scales.model_class == type(denoiser.model).__name__
        assert scales.fingerprint == structure_fingerprint(denoiser.model)
        assert scales.calibrated_on == {"forward_passes": 3}

    def test_all_calls_and_both_guidance_branches(self, wan, wan_scales):
        """Ranges are those of every input of every call: all steps, all rows of the batch, all tokens."""
        name = "blocks.1.ffn.net.2"
        seen = []
        layer = wan.model.get_submodule(name)
        handle = layer.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].reshape(-1, layer.in_features))
        )
        wan.sample()
        handle.remove()
        assert len(seen) == 3
        found, whole = wan_scales.layers[name], torch.cat(seen)
        assert torch.equal(found.input_min, whole.amin(dim=0)) and torch.equal(found.input_max, whole.amax(dim=0))
        torch.testing.assert_close(found.input_mean, whole.mean(dim=0), rtol=1e-4, atol=1e-6)
        for part in (whole[: len(whole) // 3], torch.cat([call[: len(call) // 2] for call in seen])):
            assert not torch.equal(part.amax(dim=0), whole.amax(dim=0))  # one step, or one branch, is not enough

    def test_timesteps_however_they_are_passed(self, wan, monkeypatch):
        """Positional or by keyword, whole or float: one feature row per distinct timestep."""
        monkeypatch.setattr("qvd_core.observation.grid_features", lambda model, family: {})  # only what was observed
        latents, text = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 3, 32)

        def run():
            wan.model(latents, torch.tensor([900]), text)
            wan.model(hidden_states=latents, timestep=torch.tensor([900.0]), encoder_hidden_states=text)
            wan.model(latents, encoder_hidden_states=text, timestep=torch.tensor([100]))

        spec = QuantSpec(shift=False, scale="none", temporal_quantizer="channel")
        codebook = calibrate_model(wan.model, run, spec).temporal["condition_embedder.time_proj"]
        embedder = wan.model.condition_embedder
        with torch.no_grad():
            rows = F.silu(embedder.time_embedder(embedder.timesteps_proj(torch.tensor([900.0, 100.0]))))
        torch.testing.assert_close(codebook.offset, rows.amin(dim=0), rtol=1e-4, atol=1e-6)

    def test_layers_that_never_ran_are_left_out(self, model):
        scales = calibrate_model(model, lambda: model(torch.randn(5, 64), skip=True), CHEAP)
        assert list(scales.layers) == ["layers.1"]

    def test_grad_mode_does_not_matter(self, model):
        x = torch.randn(5, 64, requires_grad=True)
        with torch.enable_grad():
            scales = calibrate_model(model, lambda: model(x), CHEAP)
        assert not any(tensor.requires_grad for tensor in scales.layers["layers.1"].tensors().values())


class TestChooses:
    def test_layers_that_share_an_input_share_one_transform(self, denoiser, scales):
        family = find_family(denoiser.model)
        groups: dict[str, list[str]] = {}
        for name in scales.layers:
            groups.setdefault(family.input_group(name), []).append(name)
        assert max(map(len, groups.values())) == 3
        for names in groups.values():
            first = scales.layers[names[0]]
            for name in names:
                assert torch.equal(scales.layers[name].input_shift, first.input_shift)
                assert torch.equal(scales.layers[name].input_scale, first.input_scale)
                assert torch.equal(scales.layers[name].input_max, first.input_max)

    def test_every_group_is_at_least_as_good_as_without(self, denoiser, scales):
        family = find_family(denoiser.model)
        groups: dict[str, list[dict[str, float]]] = {}
        for name in scales.layers:
            groups.setdefault(family.input_group(name), []).append(scales.report[name])
        for figures in groups.values():
            before, after = (
                sum(10 ** (-figure[key] / 10) for figure in figures) for key in ("sqnr_db_before", "sqnr_db")
            )
            assert after <= before * 1.0001
        summary = scales.summary()
        assert summary["sqnr_db"] > summary["sqnr_db_before"] + 1 and summary["coverage"] > summary["coverage_before"]
        assert summary["layers"] == len(scales.layers) and summary["temporal_layers"] == len(scales.temporal)

    def test_one_codebook_for_all_projections_of_one_embedding(self, unet_scales):
        codebooks = list(unet_scales.temporal.values())
        assert len(codebooks) > 5 and all(codebook is codebooks[0] for codebook in codebooks)

    def test_temporal_features_stay_apart(self, scales):
        for name in scales.temporal:
            report = scales.report[name]
            assert report["tdr"] == pytest.approx(1.0, abs=0.02) and report["tdc"] > 0.99 and report["col"] < 0.1

    def test_temporal_none_makes_no_codebook(self, wan):
        spec = QuantSpec(shift=False, scale="none", temporal="none")
        assert calibrate_model(wan.model, wan.sample, spec).temporal == {}

    def test_the_same_run_gives_the_same_scales(self, model):
        x = torch.randn(300, 64)
        one, two = (calibrate_model(model, lambda: model(x)) for _ in range(2))
        for name, layer in one.layers.items():
            assert all(torch.equal(tensor, getattr(two.layers[name], key)) for key, tensor in layer.tensors().items())
            assert layer.settings() == two.layers[name].settings()
        assert one.report == two.report


class TestTells:
    def test_progress(self, model):
        steps = []
        calibrate_model(model, lambda: model(torch.randn(5, 64)), CHEAP, progress=lambda *step: steps.append(step))
        assert steps == [(0, 2, "layers.1"), (1, 2, "layers.2"), (2, 2, "done")]

    def test_remembers_what_the_caller_says(self, model):
        note = {"prompts": ["a"]}
        scales = calibrate_model(model, lambda: model(torch.randn(5, 64)), CHEAP, calibrated_on=note)
        assert scales.calibrated_on == {"prompts": ["a"], "forward_passes": 1} and note == {"prompts": ["a"]}


class TestLeavesTheModel:
    def test_a_video_model_bit_for_bit(self, wan, unchanged):
        same = unchanged(wan.model)
        before = wan.sample()
        calibrate_model(wan.model, wan.sample, CHEAP)
        assert same() and torch.equal(wan.sample(), before)

    def test_foreign_hooks_stay(self, model):
        calls = []
        model.layers[1].register_forward_pre_hook(lambda module, args: calls.append(1))
        calibrate_model(model, lambda: model(torch.randn(5, 64)), CHEAP)
        model(torch.randn(5, 64))
        assert len(calls) == 2

    @pytest.mark.parametrize("where", ["weight", "bias"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_weight(self, model, unchanged, where, bad):
        getattr(model.layers[2], where).data.view(-1)[5] = bad
        same, ran = unchanged(model), []
        with pytest.raises(QVDError, match=rf"layers\.2\.{where} holds NaN or infinity"):
            calibrate_model(model, lambda: ran.append(1), CHEAP)
        assert same() and not ran

    @pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
    def test_bad_activation(self, model, unchanged, bad):
        x = torch.randn(5, 64)
        x[2, 3] = bad
        same = unchanged(model)
        with pytest.raises(QVDError, match=r"input of layer layers\.1 held NaN or infinity"):
            calibrate_model(model, lambda: (model(torch.randn(5, 64)), model(x)), CHEAP)
        assert same()

    def test_bad_temporal_feature(self, wan, unchanged):
        model = wan.copy()
        model.condition_embedder.time_embedder.linear_1.bias.data[0] = torch.nan
        same = unchanged(model)
        with pytest.raises(QVDError, match="NaN"):
            calibrate_model(model, lambda: wan.forward(model, 500))
        assert same()

    def test_exception_inside_run(self, model, unchanged):
        same = unchanged(model)

        def run():
            model(torch.randn(5, 64))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate_model(model, run)
        assert same()

    def test_run_that_never_calls_the_model(self, model, unchanged):
        same = unchanged(model)
        with pytest.raises(QVDError, match="never called the model"):
            calibrate_model(model, lambda: None)
        assert same()

    def test_exception_in_progress(self, model, unchanged):
        same = unchanged(model)

        def cancel(*step):
            raise InterruptedError

        with pytest.raises(InterruptedError):
            calibrate_model(model, lambda: model(torch.randn(5, 64)), CHEAP, progress=cancel)
        assert same()

    def test_quantized_model(self, model, unchanged):
        model.layers[0].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
        same = unchanged(model)
        with pytest.raises(QVDError, match="quantized already"):
            calibrate_model(model, lambda: None)
        assert same()

    def test_nothing_to_quantize(self):
        with pytest.raises(QVDError, match="no layer that QVD can quantize"):
            calibrate_model(nn.Sequential(nn.ReLU()), lambda: None)
