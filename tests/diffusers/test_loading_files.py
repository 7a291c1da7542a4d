"""Reading mapped files one tensor at a time: the same values, and pages that go with their tensor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvd_diffusers.mapped import OneByOne

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists a process's mappings")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "blocks.weight": torch.randn(64, 33).half(),
        "codes": torch.arange(-5, 6, dtype=torch.int8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
    }


def test_placeholders_come_first_and_the_stored_tensor_on_request(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    state_dict = OneByOne(load_file(tmp_path / "model.safetensors"))
    seen = set()
    for name, placeholder in state_dict.items():
        stored, expected = state_dict[name], tensors[name]
        assert placeholder.is_meta and (placeholder.shape, placeholder.dtype) == (expected.shape, expected.dtype)
        assert stored.dtype == expected.dtype and torch.equal(stored, expected)
        seen.add(name)
    assert seen == set(tensors)
    assert not len(state_dict)  # what had its turn is forgotten


def test_a_state_dict_that_no_file_holds_is_handed_on_as_it_is(tensors: dict[str, torch.Tensor]) -> None:
    state_dict = OneByOne(tensors)
    for name, _ in state_dict.items():
        assert state_dict[name] is tensors[name]


@LINUX
def test_a_tensor_of_a_file_has_a_mapping_of_its_own(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    loaded = load_file(path)
    state_dict = OneByOne(loaded)
    own = state_dict["blocks.weight"]
    assert own.data_ptr() != loaded["blocks.weight"].data_ptr()

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    before = mapped()
    del own
    assert mapped() == before - 1


@LINUX
def test_a_file_that_was_replaced_is_not_mapped_again(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    loaded = load_file(path)
    other = tmp_path / "other"
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, other)
    other.replace(path)
    assert torch.equal(OneByOne(loaded)["blocks.weight"], tensors["blocks.weight"])
