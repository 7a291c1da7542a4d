"""One-file checkpoints: what was saved comes back bit for bit, and a bad file changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from qvd_core import QuantSpec, QVDError, Scales, load_checkpoint, quantize_model, save_checkpoint
from qvd_core.checkpoint import plan_of
from qvd_core.checks import stored_problem
from qvd_core.files import read_tensors, write_tensors
from qvd_core.layers import QuantizedLayer
from qvd_core.plan import plan_layers
from qvd_core.rotation import largest_block
from tests.core.conftest import Denoiser, wan_model
from tests.core.video_clock import with_buckets, with_frames

Unchanged = Callable[[nn.Module], Callable[[], bool]]


@pytest.fixture(scope="module")
def saved(wan: Denoiser, wan_scales: Scales, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantize_model(wan.copy(), QuantSpec(activation="static"), wan_scales)
    return save_checkpoint(model, tmp_path_factory.mktemp("checkpoint") / "model.safetensors")


@pytest.mark.parametrize("calibrated", [False, True])
def test_round_trip_is_bit_identical(denoiser: Denoiser, scales: Scales, calibrated: bool, tmp_path: Path) -> None:
    spec = QuantSpec(temporal_quantizer="power") if calibrated else QuantSpec(temporal_quantizer="uniform")
    model = quantize_model(denoiser.copy(), spec, scales if calibrated else None)
    path = save_checkpoint(model, tmp_path / "model.safetensors")
    again = load_checkpoint(denoiser.copy(), path)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) and state[name].dtype == loaded[name].dtype for name in state)
    assert torch.equal(denoiser.sample(model), denoiser.sample(again))


SETTINGS = {
    "bucket": QuantSpec(activation="static_bucket"),
    "frame": QuantSpec(activation="static_frame"),
    "W4-static": QuantSpec(weight_bits=4, activation="static"),
    "W4-bucket-rotation": QuantSpec(weight_bits=4, activation="static_bucket", rotate=True),
    "rotation": QuantSpec(rotate=True, shift=False),
    "portable-frame": QuantSpec(portable=True, activation="static_frame"),
}


@pytest.mark.parametrize("spec", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_makes_the_trip(denoiser: Denoiser, scales: Scales, spec: QuantSpec, tmp_path: Path) -> None:
    factors = (0.5, 1.0, 0.8)[: 3 if isinstance(denoiser.model, WanTransformer3DModel) else 2]
    stepped = with_frames(with_buckets(scales, (0.6, 1.0, 0.8), (300.0, 700.0)), factors)
    if spec.rotate:
        stepped = _rotated(stepped)
    model = quantize_model(denoiser.copy(), spec, stepped)
    by = {layer.plan.steps_by for layer in model.modules() if isinstance(layer, QuantizedLayer)}
    assert ("timestep" in by) == (spec.activation == "static_bucket")
    assert ("major" in by) == (spec.activation == "static_frame")
    again = load_checkpoint(denoiser.copy(), save_checkpoint(model, tmp_path / "model.safetensors"))
    assert plan_of(again) == plan_of(model)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)
    assert torch.equal(denoiser.sample(model), denoiser.sample(again))


def _rotated(scales: Scales) -> Scales:
    return replace(
        scales,
        layers={
            name: replace(layer, rotation=block if (block := largest_block(len(layer.input_shift))) >= 16 else 0)
            for name, layer in scales.layers.items()
        },
    )


def test_a_skeleton_on_meta_is_enough(wan: Denoiser, saved: Path) -> None:
    with torch.device("meta"):
        skeleton = wan_model(0)
    loaded = load_checkpoint(skeleton, saved)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_the_plan_is_read_off_the_model(wan: Denoiser, wan_scales: Scales) -> None:
    spec = QuantSpec(activation="static")
    plan = plan_layers(wan.model, spec, wan_scales)
    assert plan_of(quantize_model(wan.copy(), spec, wan_scales)) == plan


def test_a_float_model_is_not_saved(wan: Denoiser, tmp_path: Path) -> None:
    with pytest.raises(QVDError, match="no quantized layer"):
        save_checkpoint(wan.model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def _edit(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> Path:
    tensors, description = read_tensors(source, "checkpoint")
    edit(tensors, description)
    return write_tensors(target, tensors, description)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, _: tensors.pop("blocks.0.attn1.to_q.weight_scale"), "missing"),
        (lambda tensors, _: tensors.update(extra=torch.zeros(1)), "unexpected"),
        (lambda tensors, _: tensors.update({"blocks.0.attn1.to_q.weight": torch.zeros(1)}), "expected torch.int8"),
        (lambda tensors, _: tensors["blocks.0.attn1.to_q.weight_scale"].fill_(torch.nan), "NaN"),
        (lambda tensors, _: tensors["blocks.0.attn1.to_q.weight_scale"].fill_(-1.0), "positive"),
        (lambda _, description: description["layers"]["blocks.0.attn1.to_q"].append("rotation:64"), "64 of its 32"),
        (lambda _, description: description["layers"]["blocks.0.attn1.to_q"].append("steps:3:timestep"), "missing"),
        (lambda _, description: description["layers"]["blocks.0.attn1.to_q"].append("steps:3:weekday"), "said to hold"),
        (lambda _, description: description["spec"].update(weight_bits=4), "expected torch.uint8"),
        (lambda _, description: description["spec"].update(weight_bits="x"), "weight_bits must be an integer"),
        (lambda _, description: description["spec"].update(unheard_of=1), "unheard_of"),
        (lambda _, description: description.update(version=99), "update QVD"),
        (lambda _, description: description.update(kind="scales"), "not a checkpoint"),
        (lambda _, description: description.update(model_class="Other"), "holds a Other"),
        (lambda _, description: description.pop("layers"), "damaged"),
        (lambda _, description: description["layers"].update(ghost=["linear"]), "ghost"),
    ],
)
def test_a_bad_file_is_one_clear_error_and_changes_nothing(
    wan: Denoiser, saved: Path, unchanged: Unchanged, tmp_path: Path, edit: Callable[..., None], message: str
) -> None:
    bad = _edit(saved, tmp_path / "bad.safetensors", edit)
    model = wan.copy()
    intact = unchanged(model)
    with pytest.raises(QVDError, match=message):
        load_checkpoint(model, bad)
    assert intact()


def test_a_truncated_file_is_one_clear_error(wan: Denoiser, saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(QVDError, match="damaged"):
        load_checkpoint(wan.copy(), bad)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("bucket_boundaries", torch.tensor([800.0, 200.0]), "must ascend"),
        ("weight", torch.tensor([[0x77, 0x80]], dtype=torch.uint8), "codes outside -7"),
        ("weight", torch.tensor([[0x77, 0x08]], dtype=torch.uint8), "codes outside -7"),
        ("gain", torch.tensor([1.0, 0.0]), "must be positive"),
        ("bias", torch.tensor([torch.inf]), "holds NaN or infinity"),
    ],
)
def test_values_no_quantizer_writes_are_named(key: str, tensor: torch.Tensor, message: str) -> None:
    assert message in (stored_problem(key, tensor) or "")
    assert stored_problem(key, torch.zeros(2, dtype=torch.int8)) in (None, "must be positive")
