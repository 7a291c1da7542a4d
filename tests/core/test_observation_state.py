"""Observations on disk: what was saved goes on exactly, and a bad file leaves the observations fresh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvd_core import QuantSpec, QVDError
from qvd_core.files import read_tensors, write_tensors
from qvd_core.observation import Observation, watch
from qvd_core.observation_state import KIND, load_observations, save_observations
from tests.core.conftest import Denoiser, wan_model

LAYER = "blocks.0.ffn.net.2"
TENSOR = f"model.inputs.{LAYER}"
PROJECTION = "condition_embedder.time_proj"

Content = tuple[dict[str, Tensor], dict[str, Any]]
Edit = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def observe(denoiser: Denoiser) -> Observation:
    observation = Observation.of(denoiser.model, QuantSpec())
    watch([observation], denoiser.sample)
    return observation


def content(observation: Observation, path: Path) -> Content:
    """Everything an observation holds, as its file has it."""
    save_observations(path, {"model": observation}, 1)
    return read_tensors(path, KIND)


def same(first: Content, second: Content) -> bool:
    tensors, others = first[0], second[0]
    equal = all(torch.equal(tensor, others[name]) for name, tensor in tensors.items() if name in others)
    return equal and tensors.keys() == others.keys() and first[1] == second[1]


@pytest.fixture(scope="module")
def saved(wan: Denoiser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("observations") / "seen.safetensors"
    save_observations(path, {"model": observe(wan)}, 2)
    return path


def test_what_was_seen_comes_back(denoiser: Denoiser, tmp_path: Path) -> None:
    observation = observe(denoiser)
    before = content(observation, tmp_path / "before.safetensors")
    fresh = Observation.of(denoiser.model, QuantSpec())
    assert load_observations(tmp_path / "before.safetensors", {"model": fresh}) == 1
    assert same(before, content(fresh, tmp_path / "after.safetensors"))


def test_an_observation_that_has_seen_nothing_comes_back(wan: Denoiser, tmp_path: Path) -> None:
    path = tmp_path / "nothing.safetensors"
    before = content(Observation.of(wan.model, QuantSpec()), path)
    fresh = Observation.of(wan.model, QuantSpec())
    load_observations(path, {"model": fresh})
    assert same(before, content(fresh, tmp_path / "after.safetensors"))


def _layer(description: dict[str, Any]) -> dict[str, Any]:
    return description["observations"]["model"]["inputs"][LAYER]


def _model(description: dict[str, Any]) -> dict[str, Any]:
    return description["observations"]["model"]


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


def _renamed(name: str) -> Edit:
    """The same observations, under another component's name."""
    return lambda _, description: description.update(observations={name: _model(description)})


def _nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


BAD: dict[str, tuple[Edit, str]] = {
    "newer": (lambda _, said: said.update(version=2), "no observations this QVD can go on from"),
    "other kind": (lambda _, said: said.update(kind="scales"), "no observations this QVD can go on from"),
    "no observations": (lambda _, said: said.update(observations=[1]), "no observations this QVD can go on from"),
    "other component": (_renamed("transformer_2"), "observations of another model"),
    "path as a name": (_renamed("../../model"), "observations of another model"),
    "other layers": (lambda _, said: _model(said)["inputs"].pop(LAYER), "another model"),
    "other projections": (lambda _, said: _model(said)["features"].pop(PROJECTION), "another model"),
    "inputs no table": (lambda _, said: _model(said).update(inputs=7), "damaged"),
    "component no table": (lambda _, said: said.update(observations={"model": None}), "another model"),
    "no done": (lambda _, said: said.pop("done"), "damaged"),
    "done negative": (lambda _, said: said.update(done=-1), "it counts -1"),
    "done nothing": (lambda _, said: said.update(done=0), "it counts 0"),
    "done huge": (lambda _, said: said.update(done=10**30), "it counts 1000"),
    "done all": (lambda _, said: said.update(done=4), "it counts 4, expected a number from 1 to 3"),
    "done text": (lambda _, said: said.update(done="2"), "it counts '2'"),
    "done true": (lambda _, said: said.update(done=True), "it counts True"),
    "no passes": (lambda _, said: _model(said).update(passes=-3), "it counts -3"),
    "passes without calls": (lambda _, said: _model(said).update(passes=2), "calls are not those of 2"),
    "rows missing": (lambda tensors, _: tensors.pop(f"{TENSOR}._rows"), "damaged"),
    "range missing": (lambda tensors, _: tensors.pop(f"{TENSOR}.bucket_maximum"), "damaged"),
    "rows of another width": (_tensor(f"{TENSOR}._rows", lambda rows: rows[:, 1:].clone()), "_rows is"),
    "mean of another width": (_tensor(f"{TENSOR}.total", lambda total: total[1:].clone()), "total is"),
    "integer range": (_tensor(f"{TENSOR}.bucket_minimum", lambda low: low.int()), "bucket_minimum is torch.int32"),
    "NaN range": (_tensor(f"{TENSOR}.bucket_minimum", _nan), "bucket_minimum holds NaN"),
    "NaN mean": (_tensor(f"{TENSOR}.total", _nan), "total holds NaN"),
    "NaN sample": (_tensor(f"{TENSOR}._rows", _nan), "_rows holds NaN"),
    "NaN keys": (_tensor(f"{TENSOR}._keys", _nan), "_keys holds NaN"),
    "fewer keys than rows": (_tensor(f"{TENSOR}._keys", lambda keys: keys[1:].clone()), "_rows is"),
    "no keys": (_tensor(f"{TENSOR}._keys", lambda keys: keys[:0].clone()), "sample of 0 rows"),
    "scalar keys": (_tensor(f"{TENSOR}._keys", lambda keys: keys[0].clone()), "damaged"),
    "count negative": (lambda _, said: _layer(said).update(count=-5), "it counts -5"),
    "count nothing": (lambda _, said: _layer(said).update(count=0), "0 rows"),
    "count a fraction": (lambda _, said: _layer(said).update(count=1.5), "it counts 1.5"),
    "a timestep more": (lambda _, said: _layer(said)["bucket_times"].append([5.0, 6.0]), "bucket_minimum is"),
    "timesteps reversed": (lambda _, said: _layer(said).update(bucket_times=[[5.0, 1.0]] * 3), "do not ascend"),
    "timestep NaN": (lambda _, said: _layer(said).update(bucket_times=[[float("nan")] * 2] * 3), "is no timestep"),
    "timestep text": (lambda _, said: _layer(said).update(bucket_times=[["a", "b"]] * 3), "is no timestep"),
    "frame order": (lambda _, said: _layer(said).update(frame_order="sideways"), "frame order 'sideways'"),
    "features short": (_tensor(f"model.features.{PROJECTION}", lambda rows: rows[1:].clone()), "features.* is"),
    "features NaN": (_tensor(f"model.features.{PROJECTION}", _nan), "features.* holds NaN"),
    "generator": (_tensor("model.generator", lambda state: state[:8].clone()), "damaged|cannot be gone on from"),
    "generator of floats": (_tensor("model.generator", lambda state: state.float()), "damaged|cannot be gone on from"),
    "choice": (lambda _, said: _model(said).update(choice=[3, [1, 2], None]), "cannot be gone on from"),
    "choice of another Python": (lambda _, said: _model(said)["choice"].__setitem__(0, 99), "cannot be gone on from"),
    "call missing": (lambda _, said: _model(said)["calls"]["list"].pop(), "calls are not those"),
    "call of nothing": (
        lambda _, said: _model(said)["calls"].update(list=[{"value": 1}] * 3),
        "calls are not those",
    ),
    "call without its tensor": (
        lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("model.calls")],
        "damaged",
    ),
    "call elsewhere": (
        lambda _, said: _model(said).update(
            calls={"list": [{"__tensor__": "model.generator", "device": "meta"}]}, passes=1
        ),
        "on the device meta",
    ),
    "call on no device": (
        lambda _, said: _model(said).update(
            calls={"list": [{"__tensor__": "model.generator", "device": "toaster"}]}, passes=1
        ),
        "damaged",
    ),
}


def write(path: Path, source: Path, edit: Edit) -> Path:
    tensors, description = read_tensors(source, KIND)
    edit(tensors, description)
    return write_tensors(path, tensors, description)


@pytest.mark.parametrize("attack", BAD)
def test_a_bad_file_is_one_clear_error_and_leaves_them_fresh(
    attack: str, wan: Denoiser, saved: Path, tmp_path: Path
) -> None:
    edit, message = BAD[attack]
    path = write(tmp_path / "bad.safetensors", saved, edit)
    fresh = Observation.of(wan.model, QuantSpec())
    before = content(fresh, tmp_path / "before.safetensors")
    with pytest.raises(QVDError, match=message) as caught:
        load_observations(path, {"model": fresh}, samples=4)
    assert str(path) in str(caught.value)
    assert same(before, content(fresh, tmp_path / "after.safetensors"))


def test_the_second_of_two_models_is_looked_at_before_the_first_changes(
    wan: Denoiser, saved: Path, tmp_path: Path
) -> None:
    seen = observe(wan)
    path = tmp_path / "two.safetensors"
    save_observations(path, {"one": seen, "two": seen}, 1)
    write(path, path, lambda tensors, _: tensors.update({f"two.inputs.{LAYER}.total": torch.zeros(3)}))
    fresh = {name: Observation.of(wan.model, QuantSpec()) for name in ("one", "two")}
    with pytest.raises(QVDError, match="total is"):
        load_observations(path, fresh)
    assert not any(observer.count for observer in fresh["one"].inputs.values())


def test_a_model_of_other_widths_is_another_model(saved: Path) -> None:
    config = {**wan_model(0).config, "ffn_dim": 128}
    other = type(wan_model(0)).from_config(config).eval()
    with pytest.raises(QVDError, match=r"is torch.* expected float32 \[\d+, 128\]"):
        load_observations(saved, {"model": Observation.of(other, QuantSpec())})


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_named(length: int, wan: Denoiser, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(QVDError, match=r"short\.safetensors is damaged"):
        load_observations(path, {"model": Observation.of(wan.model, QuantSpec())})


def test_calls_nested_too_deep_are_refused(wan: Denoiser, saved: Path, tmp_path: Path) -> None:
    nested: dict[str, Any] = {"value": 1}
    for _ in range(400):
        nested = {"list": [nested]}
    path = write(tmp_path / "deep.safetensors", saved, lambda _, said: _model(said).update(calls=nested))
    with pytest.raises(QVDError, match="calls are not those"):
        load_observations(path, {"model": Observation.of(wan.model, QuantSpec())})


def test_a_call_that_no_file_can_hold_is_said(wan: Denoiser, tmp_path: Path) -> None:
    observation = Observation.of(wan.model, QuantSpec())
    observation.calls = [((), {"processor": object()})]
    with pytest.raises(QVDError, match="holds a object, which cannot be written"):
        save_observations(tmp_path / "seen.safetensors", {"model": observation}, 1)
    assert not list(tmp_path.iterdir())
