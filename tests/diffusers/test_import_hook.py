"""A saved pipeline where nobody imported `qvd_diffusers`, as it is and with `write_import_hook`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import qvd_diffusers
from qvd_diffusers import QVDConfig, QVDError, write_import_hook

PLAIN_LOAD = """
import sys
from diffusers import DiffusionPipeline
others = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
for folder in sys.argv[1:]:
    assert "qvd_diffusers" not in sys.modules
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **others)
        print("loaded", pipe.transformer.quantization_method.value, pipe.transformer.blocks[0].attn1.to_q.weight.dtype)
    except ValueError as error:
        print("refused:", str(error).replace(chr(10), " "))
"""


@pytest.fixture(scope="module")
def saved(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig()).save_pretrained(folder)
    return folder


@pytest.fixture
def hooked(wan_folder: Path, tmp_path: Path) -> Path:
    DiffusionPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig()).save_pretrained(tmp_path)
    assert write_import_hook(tmp_path) == ["transformer"]
    return tmp_path


def test_without_the_import(saved: Path, hooked: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """diffusers says that it does not know the method; the file in the repository imports it, when it is trusted."""
    root = str(Path(qvd_diffusers.__file__).parents[1])
    modules = str(tmp_path_factory.mktemp("modules"))  # where diffusers copies trusted files to
    said = subprocess.run(
        [sys.executable, "-c", PLAIN_LOAD, str(saved), str(hooked)],
        env={**os.environ, "PYTHONPATH": root, "HF_MODULES_CACHE": modules},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    ).stdout.splitlines()
    assert said[0].startswith("refused: Unknown quantization type, got qvd - supported types are:")
    assert said[1] == "loaded qvd torch.int8"


def test_a_hooked_folder_is_otherwise_the_same(saved: Path, hooked: Path) -> None:
    before, after = (json.loads((folder / "model_index.json").read_text()) for folder in (saved, hooked))
    assert after.pop("transformer") == ["qvd_model", "WanTransformer3DModel"]
    before.pop("transformer")
    assert before == after
    assert write_import_hook(hooked) == ["transformer"]  # a second time changes nothing
    assert "from diffusers import WanTransformer3DModel" in (hooked / "transformer" / "qvd_model.py").read_text()


def test_saving_again_gives_an_ordinary_pipeline(hooked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained(hooked, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    first, second = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_a_float_pipeline_has_nothing_to_hook(wan_folder: Path) -> None:
    before = (wan_folder / "model_index.json").read_text()
    with pytest.raises(QVDError, match="no component that was quantized by QVD"):
        write_import_hook(wan_folder)
    assert (wan_folder / "model_index.json").read_text() == before


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_no_pipeline_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(QVDError, match="give the folder of a saved pipeline"):
        write_import_hook(tmp_path)


def test_code_in_the_place_of_a_class_name_is_refused(hooked: Path) -> None:
    index: dict[str, Any] = json.loads((hooked / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Wan; import os"]
    (hooked / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(QVDError, match="only classes of diffusers and transformers"):
        write_import_hook(hooked)
