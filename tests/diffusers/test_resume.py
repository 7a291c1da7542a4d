"""A calibration that is interrupted goes on where it was, and finds what it would have found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import qvd_diffusers.pipeline
from qvd_diffusers import QVDConfig, Scales, calibrate
from tests.diffusers.tiny import ANIMATE_CALL, PROMPTS, WAN_CALL

FOUR = [*PROMPTS, "a seven moving up", "a three moving left"]
CALLS = {"wan": WAN_CALL, "animate": ANIMATE_CALL, "wan22": WAN_CALL}


@pytest.fixture(autouse=True)
def saved_after_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qvd_diffusers.pipeline, "SECONDS_BETWEEN_SAVES", 0.0)


class Interrupted:
    """Stops the sampling of a pipeline, as Ctrl-C does, in the middle of a prompt."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch, after: int):
        self.calls, kind = 0, type(pipe)
        original = kind.__call__

        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self.calls == after:
                kwargs["callback_on_step_end"] = self.stop
            self.calls += 1
            return original(pipe, *args, **kwargs)

        call.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
        monkeypatch.setattr(kind, "__call__", call)

    def stop(self, *_: Any) -> Any:
        raise KeyboardInterrupt


def tensors_of(scales: Scales | dict[str, Scales]) -> dict[str, torch.Tensor]:
    each = scales if isinstance(scales, dict) else {"": scales}
    return {
        f"{component}.{name}.{key}": tensor
        for component, found in each.items()
        for name, layer in found.layers.items()
        for key, tensor in layer.tensors().items()
    }


@pytest.mark.parametrize("pipeline", CALLS)
def test_it_goes_on_and_finds_the_same(
    pipeline: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(f"{pipeline}_folder"))
    arguments: dict[str, Any] = {"config": QVDConfig(activation="static_frame"), **CALLS[pipeline]}
    expected = calibrate(pipe, FOUR, cache=False, sensitivity=True, progress=False, **arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupted(pipe, patch, after=2)
        calibrate(pipe, FOUR, sensitivity=True, **arguments)
    assert len(list(own_cache.glob("*.unfinished.safetensors"))) == 1
    with monkeypatch.context() as patch:
        counted = Interrupted(pipe, patch, after=99)
        found = calibrate(pipe, FOUR, sensitivity=True, **arguments)
        assert counted.calls == 2
    assert "interrupted after 2 of 4 prompts" in capsys.readouterr().out
    assert not list(own_cache.glob("*.unfinished.safetensors"))
    one, two = tensors_of(expected), tensors_of(found)
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    first, second = (scales if isinstance(scales, dict) else {"": scales} for scales in (expected, found))
    assert all(first[name].report == second[name].report for name in first)


def test_other_prompts_do_not_go_on(wan_pipe: Any, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupted(wan_pipe, patch, after=1)
        calibrate(wan_pipe, FOUR, progress=False, **WAN_CALL)
    counted = Interrupted(wan_pipe, monkeypatch, after=99)
    calibrate(wan_pipe, FOUR[:3], progress=False, **WAN_CALL)
    assert counted.calls == 3


def test_a_damaged_file_starts_anew(
    wan_pipe: Any, monkeypatch: pytest.MonkeyPatch, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupted(wan_pipe, patch, after=1)
        calibrate(wan_pipe, FOUR, progress=False, **WAN_CALL)
    (path,) = own_cache.glob("*.unfinished.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    counted = Interrupted(wan_pipe, monkeypatch, after=99)
    with caplog.at_level(logging.WARNING):
        calibrate(wan_pipe, FOUR, progress=False, **WAN_CALL)
    assert counted.calls == len(FOUR) and "Starting the calibration anew" in caplog.text
