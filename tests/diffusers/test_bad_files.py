"""Files that change, lead elsewhere or are not there, while a model is loaded or calibrated from them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import qvd_diffusers.mapped
from qvd_diffusers import QVDConfig, QVDError, calibrate
from qvd_diffusers.float_weights import WeightFiles
from qvd_diffusers.mapped import OneByOne
from tests.diffusers.damaged import INDEX, LAYER, ONES, WEIGHTS, Change, cast, edit, edit_json, shards
from tests.diffusers.tiny import PROMPTS, WAN_CALL, tiny_wan_transformer

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists a process's mappings")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One transformer in full precision, whole and in shards. Read-only."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_wan_transformer().save_pretrained(folder / "float")
    tiny_wan_transformer().save_pretrained(folder / "float shards", max_shard_size="60KB")
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the saved folders."""
    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


# Files that change while they are read


def stream(path: Path, meanwhile: Callable[[Path], object]) -> dict[str, Tensor]:
    state_dict = OneByOne(load_file(path))
    found: dict[str, Tensor] = {}
    for name, _ in state_dict.items():
        found[name] = state_dict[name].clone()
        if len(found) == 1:
            meanwhile(path)
    return found


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, other)
    other.replace(path)


def _renamed(path: Path) -> None:
    path.rename(f"{path}.old")


TENSORS = {"weight": (300, 33), "scalar": (), "empty": (0, 4), "codes": (1000, 77)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(shape) for name, shape in TENSORS.items()}, path)
    return path


@pytest.mark.parametrize("meanwhile", [_replaced, _renamed, os.remove, os.stat])
@pytest.mark.parametrize("listed", [True, False])
def test_the_file_that_was_opened_is_the_one_that_is_read(
    listed: bool, meanwhile: Callable[[Path], object], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not listed:
        monkeypatch.setattr(qvd_diffusers.mapped, "_MAPS", Path("/not/listed"))
    expected = {name: tensor.clone() for name, tensor in load_file(file).items()}
    found = stream(file, meanwhile)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@LINUX
@pytest.mark.parametrize("meanwhile", [lambda path: os.truncate(path, 500), lambda path: path.write_bytes(b"x" * 99)])
def test_a_file_that_is_written_to_is_no_checkpoint(meanwhile: Callable[[Path], object], file: Path) -> None:
    with pytest.raises(QVDError, match=r"model\.safetensors was written to while it was being loaded"):
        stream(file, meanwhile)


@LINUX
def test_a_file_in_the_cache_of_the_hub_is_read_one_tensor_at_a_time(file: Path) -> None:
    """There the name leads to a file that is called by its hash."""
    file.rename(file.with_name("4f2c"))
    file.symlink_to("4f2c")
    loaded = load_file(file)
    assert OneByOne(loaded)["codes"].data_ptr() != loaded["codes"].data_ptr()


# Full-precision weights for `calibrate(..., weights=...)`


def open_weights(location: Any) -> WeightFiles:
    files = WeightFiles(location, "transformer", torch.device("cpu"))
    files.check_shapes({LAYER: tiny_wan_transformer().get_submodule(LAYER)})
    files(LAYER)
    return files


INDICES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "up": (lambda index: index["weight_map"].update({LAYER: "../other.safetensors"}), "not files beside it"),
    "absolute": (lambda index: index["weight_map"].update({LAYER: "/etc/passwd"}), "not files beside it"),
    "number": (lambda index: index["weight_map"].update({LAYER: 3}), "not files beside it"),
    "empty": (lambda index: index.update(weight_map={}), "not files beside it"),
    "list": (lambda index: index.update(weight_map=[1]), "is no index"),
    "nothing": (lambda index: index.clear(), "is no index"),
    "a file that is not there": (
        lambda index: index["weight_map"].update({LAYER: "gone.safetensors"}),
        r"gone\.safetensors is missing",
    ),
}


@pytest.mark.parametrize("attack", INDICES)
def test_an_index_leads_only_to_files_beside_it(attack: str, own: Callable[[str], Path]) -> None:
    change, message = INDICES[attack]
    folder = own("float shards")
    edit_json(folder / INDEX, change)
    with pytest.raises(QVDError, match=message):
        open_weights(folder)


def test_calibration_says_so_before_it_samples(own: Callable[[str], Path], wan_folder: Path) -> None:
    pipe = WanPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig(backend="weight_only"))
    folder = own("float shards")
    (folder / INDEX).write_text("{")
    with pytest.raises(QVDError, match="is no index of a sharded model"):
        calibrate(pipe, PROMPTS, weights=folder, cache=False, progress=False, **WAN_CALL)


BIASES: dict[str, tuple[Change, str]] = {
    "missing": (lambda tensors: tensors.pop(f"{LAYER}.bias"), f"has no {LAYER}.bias"),
    "short": (lambda tensors: tensors.update({f"{LAYER}.bias": ONES[:3]}), r"bias is \[3\]"),
    "scalar": (lambda tensors: tensors.update({f"{LAYER}.bias": torch.tensor(1.0)}), r"bias is \[\]"),
    "float8": (cast(f"{LAYER}.bias", torch.float8_e4m3fn), "give the full-precision weights"),
    "transposed": (lambda tensors: tensors.update({f"{LAYER}.weight": torch.ones(16, 64)}), "another model"),
}


@pytest.mark.parametrize("attack", BIASES)
def test_weights_of_another_shape_are_another_models(attack: str, own: Callable[[str], Path]) -> None:
    change, message = BIASES[attack]
    folder = own("float")
    edit(folder, change)
    with pytest.raises(QVDError, match=message):
        open_weights(folder)


def test_a_tensor_in_two_of_the_weight_files(own: Callable[[str], Path]) -> None:
    folder = own("float shards")
    tensor = load_file(shards(folder)[0])[f"{LAYER}.weight"]
    edit(shards(folder)[-1], lambda tensors: tensors.update({f"{LAYER}.weight": tensor}))
    with pytest.raises(QVDError, match=f"{LAYER}.weight is in .*00001.* and in "):
        open_weights(folder)


def test_an_adapter_beside_the_model_is_not_the_model(own: Callable[[str], Path], saved: Path) -> None:
    folder = own("float")
    save_file({"lora.weight": ONES}, folder / "a.safetensors")
    assert open_weights(folder).files == [folder / WEIGHTS]


@pytest.mark.parametrize("location", ["", 3, None, b"folder", "x" * 5000, "a\0b"])
def test_a_place_that_is_none(location: Any) -> None:
    with pytest.raises(QVDError, match="weights"):
        open_weights(location)


@pytest.mark.parametrize("meanwhile", [os.remove, lambda path: os.truncate(path, 900)])
def test_weights_that_are_gone_when_they_are_needed(meanwhile: Callable[[Path], object], own: Any) -> None:
    folder = own("float")
    files = open_weights(folder)
    meanwhile(folder / WEIGHTS)
    with pytest.raises(QVDError, match="is missing or damaged"):
        files(LAYER)


def test_the_weights_of_a_fine_tune_are_allowed(own: Callable[[str], Path]) -> None:
    folder = own("float")
    edit(folder, lambda tensors: tensors[f"{LAYER}.weight"].mul_(1.5))
    assert open_weights(folder)(LAYER)[0].dtype == torch.float32
