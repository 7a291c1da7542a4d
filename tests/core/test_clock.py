"""The sampling clock: what it reads off a forward pass, and which steps it then hands to the layers."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle

import diffusers
import pytest
import torch

from qvd_core import QuantSpec, Scales, dequantize_model, quantize_model
from qvd_core.clock import SamplingClock
from qvd_core.families import FAMILIES, Family
from qvd_core.layers import QuantizedLayer
from tests.core.conftest import Denoiser
from tests.core.video_clock import VIDEO, Model, clock, with_buckets, with_frames

LATENTS = torch.zeros(2, 4, 3, 8, 8)


class TestReads:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((LATENTS, torch.tensor([500, 500])), {}),
            ((LATENTS,), {"timestep": torch.tensor(500)}),
            ((), {"timestep": 500, "hidden_states": LATENTS}),
            ((LATENTS, 500.0), {}),
            ((), {"hidden_states": LATENTS, "timestep": torch.tensor([500.0], dtype=torch.bfloat16)}),
        ],
    )
    def test_positional_and_keyword(self, args, kwargs):
        found = SamplingClock(Model(), VIDEO)
        found.read(Model(), args, kwargs)
        assert found.timestep.dtype == torch.float32 and found.timestep.dim() == 0
        assert (float(found.timestep), found.batch, found.frames) == (500.0, 2, 3)

    def test_of_one_timestep_per_token_the_noisiest(self):
        """Image to video: the first frame is clean, the others are not; the ranges follow the noisy ones."""
        found = SamplingClock(Model(), VIDEO)
        found.read(Model(), (LATENTS, torch.tensor([[0.0, 0.0, 800.0, 800.0]] * 2)), {})
        assert float(found.timestep) == 800.0

    def test_a_pass_without_timestep_keeps_the_last_one(self):
        found = SamplingClock(Model(), VIDEO)
        assert found.timestep is None
        for arguments in ((LATENTS, 300), (LATENTS,), (LATENTS, None)):
            found.read(Model(), arguments, {})
        assert float(found.timestep) == 300.0

    def test_latents_without_a_frame_dimension_have_no_frames(self):
        flat = Family("flat", (), ())
        found = SamplingClock(Model(), flat)
        found.read(Model(), (LATENTS, 5), {})
        assert (found.batch, found.frames) == (0, 0) and found.frame_of_rows(6, "major") is None

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_every_family_names_arguments_its_models_have(self, family):
        for name in family.classes:
            kind = getattr(diffusers, name, None)
            if kind is None:
                pytest.skip(f"this diffusers has no {name}")
            parameters = inspect.signature(kind.forward).parameters
            named = {family.timestep_argument, family.sample_argument} - {""}
            # A motion adapter is part of a UNet, and has no forward pass of its own.
            assert named <= parameters.keys() or kind.forward is torch.nn.Module.forward


class TestFrameOfRows:
    @pytest.mark.parametrize(("batch", "frames", "positions"), [(1, 1, 4), (1, 3, 1), (2, 3, 4), (3, 5, 2)])
    def test_against_a_loop(self, batch, frames, positions):
        found = clock(batch=batch, frames=frames)
        rows = batch * frames * positions
        major = [frame for _ in range(batch) for frame in range(frames) for _ in range(positions)]
        minor = [frame for _ in range(batch) for _ in range(positions) for frame in range(frames)]
        assert found.frame_of_rows(rows, "major").tolist() == major
        assert found.frame_of_rows(rows, "minor").tolist() == minor

    @pytest.mark.parametrize("rows", [0, 1, 5, 7])
    def test_rows_that_are_not_whole_frames(self, rows):
        assert clock(batch=2, frames=3).frame_of_rows(rows, "major") is None


class TestSteps:
    steps = torch.tensor([1.0, 4.0, 2.0])
    boundaries = torch.tensor([200.0, 600.0])

    @pytest.mark.parametrize(
        ("timestep", "expected"), [(-5, 1), (0, 1), (199, 1), (201, 4), (599, 4), (601, 2), (1000, 2), (5000, 2)]
    )
    def test_bucket(self, timestep, expected, caplog):
        step = clock(float(timestep)).bucket_step(self.steps, self.boundaries)
        assert step.shape == (1,) and float(step) == expected and not caplog.records

    def test_frames(self, caplog):
        step = clock(batch=2, frames=3).frame_step(self.steps, 12, "major")
        assert step.shape == (12, 1) and step[:, 0].tolist() == [1, 1, 4, 4, 2, 2] * 2
        assert clock(batch=2, frames=3).frame_step(self.steps, 6, "minor")[:, 0].tolist() == [1, 4, 2] * 2
        assert not caplog.records

    def test_an_unknown_timestep_gets_the_widest_step_and_one_warning(self, caplog):
        found = clock(None)
        for _ in range(3):
            assert torch.equal(found.bucket_step(self.steps, self.boundaries), torch.tensor([4.0]))
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "no timestep is known" in caplog.text

    def test_other_frames_get_the_widest_step_and_one_warning(self, caplog):
        found = clock(batch=2, frames=5)
        for _ in range(3):
            assert torch.equal(found.frame_step(self.steps, 10, "major"), torch.tensor([4.0]))
        assert len(caplog.records) == 1 and "5 latent frames are sampled, 3 were calibrated" in caplog.text


@pytest.fixture
def bucketed(wan: Denoiser, wan_scales: Scales):
    """A Wan whose steps are far too small below timestep 300: outputs tell which bucket was taken."""
    scales = with_buckets(wan_scales, (0.1, 1.0, 0.7), (300.0, 700.0))
    return quantize_model(wan.copy(), QuantSpec(activation="static_bucket"), scales)


def clocks(model: torch.nn.Module) -> set[SamplingClock]:
    return {layer.clock for layer in model.modules() if isinstance(layer, QuantizedLayer) and layer.clock is not None}


class TestInAModel:
    def test_the_hook_winds_the_one_clock_of_all_layers(self, wan, bucketed):
        (shared,) = clocks(bucketed)
        wan.forward(bucketed, 900.0)
        assert float(shared.timestep) == 900.0 and (shared.batch, shared.frames) == (2, 3)
        wan.forward(bucketed, 100.0)
        assert float(shared.timestep) == 100.0

    def test_static_models_have_no_clock(self, wan, wan_scales):
        model = quantize_model(wan.copy(), QuantSpec(activation="static"), wan_scales)
        assert not clocks(model) and not model._forward_pre_hooks

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_has_a_clock_of_its_own(self, wan, bucketed, how):
        wan.forward(bucketed, 900.0)
        expected = wan.sample(bucketed)
        other = copy.deepcopy(bucketed) if how == "deepcopy" else pickle.loads(pickle.dumps(bucketed))  # noqa: S301
        (first,), (second,) = clocks(bucketed), clocks(other)
        assert first is not second
        wan.forward(bucketed, 900.0)
        wan.forward(other, 100.0)
        assert (float(first.timestep), float(second.timestep)) == (900.0, 100.0)
        assert torch.equal(wan.sample(other), expected)

    @pytest.mark.parametrize("copied", [False, True])
    def test_dequantizing_takes_the_hook_off(self, wan, bucketed, copied):
        model = copy.deepcopy(bucketed) if copied else bucketed
        plain = dequantize_model(model)
        assert not plain._forward_pre_hooks and not plain._forward_pre_hooks_with_kwargs
        assert wan.sqnr_db(plain) > 30
        assert bool(bucketed._forward_pre_hooks) == copied

    def test_another_number_of_frames_still_runs(self, wan, wan_scales, caplog):
        scales = with_frames(wan_scales, (0.5, 1.0, 0.8))
        model = quantize_model(wan.copy(), QuantSpec(activation="static_frame"), scales)
        static = quantize_model(wan.copy(), QuantSpec(activation="static"), wan_scales)
        latents, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 6, 32)
        arguments = {"hidden_states": latents, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
        with torch.no_grad():
            outputs = [each(**arguments).sample for each in (model, model, static)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        assert len([record for record in caplog.records if "widest" in record.message]) == 1

    def test_a_layer_taken_out_of_its_model_uses_the_widest_step(self, bucketed):
        layer = copy.deepcopy(bucketed.blocks[0].attn1.to_q)
        layer.clock = None
        assert torch.equal(layer.static_step(4), layer.activation_scale.amax().view(1))
