"""Files that are whole or not there, and one clear error for everything else."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qvd_core.files
from qvd_core import QVDError
from qvd_core.files import read_tensors, write_tensors

TENSORS = {
    "a": torch.tensor([1.0, -0.0, 3.5]),
    "b.c": torch.randn(3, 4).T,  # not contiguous
    "empty": torch.zeros(0),
    "codes": torch.tensor([-128, 127], dtype=torch.int8),
    "half": torch.tensor([0.1], dtype=torch.bfloat16),
}
DESCRIPTION = {"kind": "test", "nested": {"list": [1, 2.5, None, True], "text": "σ, ≤, \n"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "file.safetensors"


def test_round_trip(path):
    assert write_tensors(path, TENSORS, DESCRIPTION) == path
    tensors, description = read_tensors(path, "test")
    assert description == DESCRIPTION and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert torch.signbit(tensors["a"][1])


def test_shared_memory_and_gradients_are_no_obstacle(path):
    shared = torch.randn(4, requires_grad=True)
    write_tensors(str(path), {"a": shared, "b": shared[:2]}, {})
    assert torch.equal(read_tensors(path, "test")[0]["b"], shared[:2])


def test_what_json_cannot_say_is_written_as_text(path):
    write_tensors(path, {}, {"dtype": torch.bfloat16})
    assert read_tensors(path, "test")[1] == {"dtype": "torch.bfloat16"}


def test_other_tools_can_read_it(path):
    write_tensors(path, TENSORS, DESCRIPTION)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt" and json.loads(file.metadata()["qvd"]) == DESCRIPTION


def test_what_was_read_outlives_the_file(path):
    write_tensors(path, TENSORS, DESCRIPTION)
    tensors, _ = read_tensors(path, "test")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_failure_leaves_the_old_file(path, monkeypatch, when):
    write_tensors(path, TENSORS, DESCRIPTION)
    before = path.read_bytes()

    def fail(*arguments):
        if when == "writing":
            arguments[1].write_bytes(b"half a file")
        raise OSError("no space left on device")

    if when == "writing":
        monkeypatch.setattr(qvd_core.files, "save_file", fail)
    else:
        monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(QVDError, match=r"cannot write .*no space left"):
        write_tensors(path, {"other": torch.zeros(5)}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]  # and nothing half-written beside it


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(QVDError, match="cannot write"):
        write_tensors(tmp_path / "file" / "x.safetensors", TENSORS, {})


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(parents=True)], ids=["missing", "folder"])
def test_no_file(path, make):
    make(path)
    with pytest.raises(QVDError, match=r"scales file .* does not exist"):
        read_tensors(path, "scales")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated(path, share):
    write_tensors(path, TENSORS, DESCRIPTION)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(QVDError, match="damaged or no safetensors file"):
        read_tensors(path, "scales")


def test_something_else_entirely(path):
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG" + bytes(range(256)) * 4)
    with pytest.raises(QVDError, match="damaged or no safetensors file"):
        read_tensors(path, "scales")


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"qvd": ""}, {"qvd": "{"}, {"qvd": "[]"}, {"qvd": "3"}, {"qvd": "null"}, {"qvd": "[" * 100_000}],
    ids=lambda metadata: str(metadata)[:20],
)
def test_somebody_elses_safetensors(path, metadata):
    path.parent.mkdir()
    save_file({"a": torch.zeros(2)}, path, metadata)
    with pytest.raises(QVDError, match="not a scales file of QVD"):
        read_tensors(path, "scales")
