"""`calibrate`: what it observes, what it caches, and that it leaves the pipeline alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from qvd_core.observation import Observation
from qvd_core.spec import QuantSpec
from qvd_diffusers import QVDConfig, Scales, calibrate
from qvd_diffusers.job import Job
from tests.diffusers.tiny import PROMPTS, WAN_CALL, sample_frames


def snapshot(pipe: Any) -> tuple[Any, ...]:
    """Everything about a pipeline that calibration must not change."""
    model = pipe.transformer
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    settings = dict(model.config), model.training, getattr(pipe, "_progress_bar_config", "never set")
    return hooks, settings, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(pipe: Any, before: tuple[Any, ...]) -> None:
    hooks, settings, state = snapshot(pipe)
    assert hooks == before[0]
    assert settings == before[1]
    assert state.keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in state.items())


@pytest.fixture
def calls(wan_pipe: WanPipeline) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the denoiser."""
    seen: list[dict[str, Any]] = []
    handle = wan_pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    yield seen
    handle.remove()


def test_every_step_of_every_prompt_and_both_branches_are_observed(
    wan_pipe: WanPipeline, calls: list[dict[str, Any]]
) -> None:
    scales = calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)
    branches = 2 if WAN_CALL["guidance_scale"] > 1 else 1
    assert len(calls) == len(PROMPTS) * WAN_CALL["num_inference_steps"] * branches
    assert scales.calibrated_on["prompts"] == PROMPTS
    assert "blocks.1.ffn.net.2" in scales.layers
    assert "condition_embedder.time_proj" in scales.temporal


def test_nothing_is_decoded_and_nothing_is_changed(wan_pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_pipe.vae, "decode", lambda *_, **__: pytest.fail("decoded"))
    before, noise = snapshot(wan_pipe), torch.get_rng_state()
    calibrate(wan_pipe, PROMPTS[:1], progress=False, **WAN_CALL)
    assert_untouched(wan_pipe, before)
    assert torch.equal(torch.get_rng_state(), noise)


def test_the_same_seed_finds_the_same_scales(wan_pipe: WanPipeline) -> None:
    first, second = (calibrate(wan_pipe, PROMPTS[0], seed=3, cache=False, progress=False, **WAN_CALL) for _ in range(2))
    other = calibrate(wan_pipe, PROMPTS[0], seed=4, cache=False, progress=False, **WAN_CALL)
    name = "blocks.0.ffn.net.2"
    assert torch.equal(first.layers[name].input_min, second.layers[name].input_min)
    assert not torch.equal(first.layers[name].input_min, other.layers[name].input_min)


def test_a_function_may_sample_as_it_likes(wan_pipe: WanPipeline, calls: list[dict[str, Any]], own_cache: Path) -> None:
    scales = calibrate(wan_pipe, lambda pipe: sample_frames(pipe, {**WAN_CALL, "guidance_scale": 1.0}), progress=False)
    assert len(calls) == WAN_CALL["num_inference_steps"]
    assert scales.layers
    assert not list(own_cache.glob("*"))  # what a function does cannot be seen, so it is never cached


def test_the_bar_shows_prompts_and_steps(wan_pipe: WanPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(wan_pipe, PROMPTS, **WAN_CALL)
    shown = capsys.readouterr().err
    assert "Calibrating" in shown and "2/2" in shown and "step 3" in shown
    assert "Searching scales" in shown
    assert "0/3" not in shown  # the pipeline's own bar over steps


def test_a_second_calibration_is_read_from_the_cache(
    wan_pipe: WanPipeline, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)
    count = len(calls)
    second = calibrate(wan_pipe, PROMPTS, **WAN_CALL)
    assert len(calls) == count
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "Using cached scales" in printed[0] and "calibrated on 2 prompts" in printed[0]
    for name, layer in first.layers.items():
        assert torch.equal(layer.input_scale, second.layers[name].input_scale)


def changed_weight(pipe: WanPipeline) -> dict[str, Any]:
    with torch.no_grad():
        pipe.transformer.blocks[0].ffn.net[2].weight[0, 0] += 1
    return {}


class Twin(FlowMatchEulerDiscreteScheduler):
    """Another sampler with the same settings."""


CHANGES = {
    "a weight": changed_weight,
    "the scheduler": lambda pipe: pipe.scheduler.register_to_config(shift=5.0) or {},
    "the text encoder": lambda pipe: pipe.text_encoder.shared.weight.data.mul_(2).sum() * 0 or {},
    "the prompts": lambda pipe: {"prompts": PROMPTS[::-1]},
    "the seed": lambda pipe: {"seed": 1},
    "the steps": lambda pipe: {"num_inference_steps": 2},
    "the settings": lambda pipe: {"config": QVDConfig(weight_bits=4)},
    "the class of the scheduler": lambda pipe: (
        setattr(pipe, "scheduler", Twin.from_config(pipe.scheduler.config)) or {}
    ),
    "the sensitivity": lambda pipe: {"sensitivity": True},
}


def job_key(pipe: Any, spec: QuantSpec, *arguments: Any) -> str | None:
    return Job(pipe, {"transformer": Observation.of(pipe.transformer, spec)}, spec, *arguments).key()


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_the_scales_misses_the_cache(what: str, wan_pipe: WanPipeline) -> None:
    def key(**changes: Any) -> str | None:
        call = {**WAN_CALL, **{name: value for name, value in changes.items() if name in WAN_CALL}}
        spec = changes.get("config", QVDConfig()).spec
        assert isinstance(spec, QuantSpec)
        prompts, seed = changes.get("prompts", PROMPTS), changes.get("seed", 0)
        sensitivity = changes.get("sensitivity", False)
        return job_key(wan_pipe, spec, prompts, seed, call, sensitivity)

    before = key()
    assert before == key()
    assert key(**CHANGES[what](wan_pipe)) != before


def test_tensors_and_images_in_the_call_are_part_of_the_key(wan_pipe: WanPipeline) -> None:
    def key(value: Any) -> str | None:
        call = {"prompt_embeds": value}
        return job_key(wan_pipe, QVDConfig().spec, PROMPTS, 0, call, False)

    assert key(torch.zeros(2)) == key(torch.zeros(2)) != key(torch.ones(2))
    assert key(lambda: None) is None  # no content that could be compared: not cached


def test_a_damaged_cache_file_is_replaced(
    wan_pipe: WanPipeline, own_cache: Path, caplog: pytest.LogCaptureFixture, calls: list[dict[str, Any]]
) -> None:
    calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)
    (path,) = own_cache.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    count = len(calls)
    with caplog.at_level(logging.WARNING):
        calibrate(wan_pipe, PROMPTS, progress=False, **WAN_CALL)
    assert len(calls) > count
    assert "Ignoring a cached calibration" in caplog.text
    Scales.load(path)


def test_the_cache_can_be_left_out_or_put_elsewhere(wan_pipe: WanPipeline, own_cache: Path, tmp_path: Path) -> None:
    calibrate(wan_pipe, PROMPTS[:1], cache=tmp_path / "mine", progress=False, **WAN_CALL)
    assert len(list((tmp_path / "mine").glob("*.safetensors"))) == 1
    calibrate(wan_pipe, PROMPTS[:1], cache=False, progress=False, **WAN_CALL)
    assert not own_cache.exists()


def test_the_users_progress_bar_settings_come_back(wan_pipe: WanPipeline) -> None:
    wan_pipe.set_progress_bar_config(desc="mine")
    calibrate(wan_pipe, PROMPTS[:1], progress=False, **WAN_CALL)
    assert wan_pipe._progress_bar_config == {"desc": "mine"}


def test_an_error_while_sampling_leaves_everything_as_it_was(wan_pipe: WanPipeline, own_cache: Path) -> None:
    before = snapshot(wan_pipe)

    def fail_at_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(wan_pipe, PROMPTS, progress=False, callback_on_step_end=fail_at_step, **WAN_CALL)
    assert_untouched(wan_pipe, before)
    assert not list(own_cache.glob("*"))


def test_few_prompts_for_static_scales_are_warned_of(wan_pipe: WanPipeline, caplog: pytest.LogCaptureFixture) -> None:
    for activation, warned in (("token", False), ("static", True)):
        caplog.clear()
        calibrate(
            wan_pipe, PROMPTS[:1], config=QVDConfig(activation=activation), cache=False, progress=False, **WAN_CALL
        )
        assert ("Static scales from 1 prompt clip" in caplog.text) == warned
