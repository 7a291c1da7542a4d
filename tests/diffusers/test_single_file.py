"""`from_single_file`: float files in diffusers' or in the original names, and files that QVD saved."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, WanPipeline, WanTransformer3DModel
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file

from qvd_diffusers import QVDConfig, QVDError, QVDQuantizer, Scales, calibrate
from qvd_diffusers.single_file import HeldBack
from tests.diffusers.tiny import PROMPTS, WAN_CALL, tiny_wan_transformer
from tests.tiny_models import tiny_family

FILE = "diffusion_pytorch_model.safetensors"

SHOWS_FILES_BEFORE_RENAMING = pytest.mark.skipif(
    "maybe_update_state_dict" not in inspect.getsource(single_file_model),
    reason="this diffusers renames a quantized single file before a quantizer sees it",
)

WAN_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("proj_out", "head.head"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm?."),
    (".norm3.", ".norm2."),
    (".norm?.", ".norm3."),
)
LTX_NAMES = (("proj_in", "patchify_proj"), ("time_embed", "adaln_single"), ("norm_q", "q_norm"), ("norm_k", "k_norm"))


def original_wan(name: str) -> str:
    """A tensor's name in the files of Wan's authors."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in (*WAN_NAMES, ("scale_shift_table", "modulation")):
        name = name.replace(ours, theirs)
    return name


def original_ltx(name: str) -> str:
    for ours, theirs in LTX_NAMES:
        name = name.replace(ours, theirs)
    return "model.diffusion_model." + name


MODELS: dict[str, tuple[Callable[[], Any], Callable[[str], str]]] = {
    "wan": (tiny_wan_transformer, original_wan),
    "ltx": (lambda: tiny_family("ltx").model, original_ltx),
}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    MODELS[request.param][0]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wan_scales(wan_folder: Path) -> Scales:
    pipe = WanPipeline.from_pretrained(wan_folder)
    found: Scales = calibrate(pipe, PROMPTS[:1], cache=False, progress=False, **WAN_CALL)
    return found


def assert_same_state(first: Any, second: Any) -> None:
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


# Full-precision files


@pytest.mark.parametrize(("folder", "kind"), [("wan", "wan"), ("ltx", "ltx")], indirect=["folder"])
def test_a_float_file_with_the_authors_names_is_quantized(folder: Path, kind: str, tmp_path: Path) -> None:
    build, original = MODELS[kind]
    model_class: Any = type(build())
    tensors = load_file(folder / FILE)
    save_file({original(name): tensor for name, tensor in tensors.items()}, tmp_path / "original.safetensors")
    loaded = model_class.from_single_file(
        str(tmp_path / "original.safetensors"), config=str(folder), quantization_config=QVDConfig()
    )
    assert_same_state(loaded, model_class.from_pretrained(folder, quantization_config=QVDConfig()))
    loaded.save_pretrained(tmp_path / "int8")
    assert_same_state(loaded, model_class.from_pretrained(tmp_path / "int8"))


@pytest.mark.parametrize("folder", ["wan"], indirect=True)
def test_a_dict_of_tensors_is_left_to_its_owner(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    names = list(tensors)
    WanTransformer3DModel.from_single_file(tensors, config=str(folder), quantization_config=QVDConfig())
    assert list(tensors) == names


@SHOWS_FILES_BEFORE_RENAMING
@pytest.mark.parametrize("folder", ["wan"], indirect=True)
def test_a_file_that_needs_no_renaming_is_read_one_tensor_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    create = QVDQuantizer.create_quantized_param

    def spy(quantizer: QVDQuantizer, model: Any, value: torch.Tensor, name: str, *rest: Any, **more: Any) -> None:
        state_dict = rest[1]
        assert isinstance(state_dict, HeldBack) and value.is_meta
        left.append(len(state_dict))
        create(quantizer, model, value, name, *rest, **more)

    monkeypatch.setattr(QVDQuantizer, "create_quantized_param", spy)
    WanTransformer3DModel.from_single_file(str(folder / FILE), config=str(folder), quantization_config=QVDConfig())
    assert left == list(range(len(left), 0, -1))


@pytest.mark.parametrize("folder", ["wan"], indirect=True)
def test_torch_dtype_counts_for_a_float_file(folder: Path) -> None:
    loaded = WanTransformer3DModel.from_single_file(
        str(folder / FILE), config=str(folder), torch_dtype=torch.bfloat16, quantization_config=QVDConfig()
    )
    expected = WanTransformer3DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, quantization_config=QVDConfig()
    )
    assert_same_state(loaded, expected)


# Files that QVD saved


SAVED: dict[str, dict[str, Any]] = {
    "data-free": {},
    "four bits": {"weight_bits": 4},
    "calibrated": {"scales": True},
    "static": {"scales": True, "activation": "static_bucket"},
    "attention": {"attention": "native"},
}


@SHOWS_FILES_BEFORE_RENAMING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_a_quantized_file_loads_with_the_folder_it_came_from(
    settings: dict[str, Any], dtype: torch.dtype, wan_folder: Path, wan_scales: Scales, tmp_path: Path
) -> None:
    settings = {**settings, "scales": wan_scales if settings.get("scales") else None}
    saved = WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", torch_dtype=dtype, quantization_config=QVDConfig(**settings)
    )
    saved.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_single_file(
        str(tmp_path / FILE), config=str(tmp_path), quantization_config=QVDConfig()
    )
    assert_same_state(loaded, saved)
    assert loaded.dtype == dtype  # recorded: nobody has to know it
    assert loaded.hf_quantizer.quantization_config == saved.hf_quantizer.quantization_config
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


@SHOWS_FILES_BEFORE_RENAMING
def test_another_class_and_a_torch_dtype_of_ones_own(tmp_path: Path) -> None:
    MODELS["ltx"][0]().save_pretrained(tmp_path / "float")
    saved = LTXVideoTransformer3DModel.from_pretrained(tmp_path / "float", quantization_config=QVDConfig())
    saved.save_pretrained(tmp_path / "int8")
    arguments = {"config": str(tmp_path / "int8"), "quantization_config": QVDConfig()}
    file = str(tmp_path / "int8" / FILE)
    assert_same_state(LTXVideoTransformer3DModel.from_single_file(file, **arguments), saved)
    narrow = LTXVideoTransformer3DModel.from_single_file(file, torch_dtype=torch.bfloat16, **arguments)
    expected = LTXVideoTransformer3DModel.from_pretrained(tmp_path / "int8", torch_dtype=torch.bfloat16)
    assert_same_state(narrow, expected)


@SHOWS_FILES_BEFORE_RENAMING
def test_other_settings_for_a_quantized_file_are_ignored_with_a_warning(
    wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", quantization_config=QVDConfig())
    saved.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "qvd_diffusers.single_file"):
        loaded = WanTransformer3DModel.from_single_file(
            str(tmp_path / FILE), config=str(tmp_path), quantization_config=QVDConfig(weight_bits=4)
        )
    assert "is quantized already: QVDConfig(" in caplog.text
    assert_same_state(loaded, saved)


def test_a_quantized_file_without_its_config_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    saved = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", quantization_config=QVDConfig())
    saved.save_pretrained(tmp_path)
    with pytest.raises(QVDError, match=r"integer codes, and no config.json says how .*from_pretrained"):
        WanTransformer3DModel.from_single_file(
            str(tmp_path / FILE), config=str(wan_folder / "transformer"), quantization_config=QVDConfig()
        )


@SHOWS_FILES_BEFORE_RENAMING
def test_a_quantized_file_of_another_model_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    saved = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", quantization_config=QVDConfig())
    saved.save_pretrained(tmp_path)
    kept = WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", quantization_config=QVDConfig(modules_to_not_convert=["blocks.0"])
    )
    kept.save_pretrained(tmp_path / "other")
    with pytest.raises(QVDError, match=r"do not belong together|lacks"):
        WanTransformer3DModel.from_single_file(
            str(tmp_path / FILE), config=str(tmp_path / "other"), quantization_config=QVDConfig()
        )
