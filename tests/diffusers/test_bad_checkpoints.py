"""Damaged, mixed and foreign checkpoints: one clear error each, and never a model that computes with something else."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import Tensor

from qvd_diffusers import QVDConfig, QVDError
from tests.diffusers.damaged import INDEX, LAYER, ONES, WEIGHTS, cast, edit, edit_json, shards
from tests.diffusers.tiny import tiny_wan_transformer

PROJECTION = "condition_embedder.time_proj"
SHOWS_FILES = hasattr(DiffusersQuantizer, "maybe_update_state_dict")
NAMES_ONLY = "this version of diffusers shows a quantizer the names of a checkpoint's tensors, not their types"


def load(folder: Path, **arguments: Any) -> Any:
    return WanTransformer3DModel.from_pretrained(folder, **arguments)


def quantize(folder: Path, **arguments: Any) -> Any:
    return load(folder, quantization_config=QVDConfig(), **arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One transformer in full precision and in int8, whole and in shards. Read-only."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_wan_transformer()
    model.save_pretrained(folder / "float")
    model.save_pretrained(folder / "float shards", max_shard_size="60KB")
    quantized = quantize(folder / "float")
    quantized.save_pretrained(folder / "int8")
    quantized.save_pretrained(folder / "int8 shards", max_shard_size="40KB")
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the saved folders."""
    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


# Types


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", ["proj_out.weight", "scale_shift_table"])
def test_codes_do_not_pass_for_tensors_that_stay_in_float(
    name: str, dtype: torch.dtype, own: Callable[[str], Path]
) -> None:
    for kind, read in (("float", quantize), ("int8", load)):
        folder = own(kind)
        edit(folder, cast(name, dtype))
        with pytest.raises(QVDError, match=rf"{name} is {dtype}, but this model keeps it in floating point"):
            read(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
def test_a_quantized_tensor_of_another_type_is_named(
    suffix: str, dtype: torch.dtype, own: Callable[[str], Path]
) -> None:
    folder = own("int8")
    edit(folder, cast(f"{LAYER}.{suffix}", dtype))
    with pytest.raises(QVDError, match=rf"{LAYER}\.{suffix} is {str(dtype)[6:]} .* expected (int8|float32)"):
        load(folder)


def test_a_bias_of_eight_bits_is_no_bias(own: Callable[[str], Path]) -> None:
    folder = own("int8")
    edit(folder, cast(f"{LAYER}.bias", torch.float8_e4m3fn))
    with pytest.raises(QVDError, match=r"bias is float8_e4m3fn .* expected float32"):
        load(folder)


def test_float64_weights_are_full_precision(own: Callable[[str], Path], saved: Path) -> None:
    folder = own("float")
    edit(folder, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    expected = load(saved / "int8").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in quantize(folder).state_dict().items())


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_float16_cannot_hold_is_named(kind: str, own: Callable[[str], Path]) -> None:
    folder = own(kind)
    edit(folder, lambda tensors: tensors["proj_out.weight"].view(-1)[:1].fill_(1e30))
    with pytest.raises(QVDError, match=r"proj_out\.weight .*leaves the range of float16"):
        (quantize if kind == "float" else load)(folder, torch_dtype=torch.float16)


# Tensors that diffusers would leave out, or fill in


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize(
    "extra",
    [
        {f"{LAYER}.input_shift": ONES},
        {f"{LAYER}.comfy_quant": ONES.to(torch.uint8)},
        {f"{LAYER}.weight.absmax": ONES},
        {"proj_out.weight_scale": ONES},
        pytest.param(
            {"blocks.7.attn1.to_q.weight": ONES.to(torch.int8)},
            marks=pytest.mark.skipif(not SHOWS_FILES, reason=NAMES_ONLY),
        ),
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_quantized_tensors_nobody_asked_for_are_named(
    extra: dict[str, Tensor], kind: str, own: Callable[[str], Path]
) -> None:
    folder = own(kind)
    edit(folder, lambda tensors: tensors.update(extra))
    name = next(iter(extra))
    with pytest.raises(QVDError, match=rf"the checkpoint holds {name}.*(quantized already|do not belong together)"):
        (quantize if kind == "float" else load)(folder)


@pytest.mark.parametrize("name", [f"{LAYER}.weight_scale", f"{PROJECTION}.levels"])
def test_a_float_checkpoint_with_scales_is_a_quantized_one(name: str, own: Callable[[str], Path], saved: Path) -> None:
    folder = own("float")
    stored = load_file(saved / "int8" / WEIGHTS)[name]
    edit(folder, lambda tensors: tensors.update({name: stored.clone()}))
    with pytest.raises(QVDError, match=f"holds {name}: this checkpoint is quantized already"):
        quantize(folder)


@pytest.mark.parametrize("kind", ["float shards", "int8 shards"])
class TestShards:
    @pytest.fixture
    def read(self, kind: str) -> Callable[[Path], Any]:
        return quantize if kind.startswith("float") else load

    @pytest.fixture
    def folder(self, kind: str, own: Callable[[str], Path]) -> Path:
        return own(kind)

    def test_a_tensor_in_two_files_is_named(self, folder: Path, read: Callable[[Path], Any]) -> None:
        first, *_, last = shards(folder)
        name, tensor = sorted(load_file(first).items())[0]
        edit(last, lambda tensors: tensors.update({name: tensor * 2}))
        with pytest.raises(QVDError, match=f"{name} is in more than one file"):
            read(folder)

    @pytest.mark.skipif(not SHOWS_FILES, reason=NAMES_ONLY)
    def test_codes_the_index_does_not_name_are_refused(self, folder: Path, read: Callable[[Path], Any]) -> None:
        edit(shards(folder)[-1], lambda tensors: tensors.update({"other.weight": ONES.to(torch.int8)}))
        with pytest.raises(QVDError, match=r"the checkpoint holds other\.weight"):
            read(folder)

    def test_a_tensor_the_index_promises_is_missed(self, folder: Path, read: Callable[[Path], Any]) -> None:
        name = sorted(load_file(shards(folder)[-1]))[0]
        edit(shards(folder)[-1], lambda tensors: tensors.pop(name))
        with pytest.raises(QVDError, match=f"{name} never arrived"):
            read(folder)

    def test_a_tensor_the_index_forgets_is_missed(self, folder: Path, read: Callable[[Path], Any]) -> None:
        edit_json(folder / INDEX, lambda index: index["weight_map"].pop(f"{LAYER}.weight"))
        with pytest.raises(QVDError, match=rf"lacks {LAYER}\.weight"):
            read(folder)

    @pytest.mark.parametrize("content", [b"", b"\x89PNG" + bytes(200), struct.pack("<Q", 2**60) + bytes(99)])
    def test_a_damaged_file_is_diffusers_to_name(
        self, content: bytes, folder: Path, read: Callable[[Path], Any]
    ) -> None:
        shards(folder)[-1].write_bytes(content)
        with pytest.raises(OSError, match=shards(folder)[-1].name):
            read(folder)

    def test_a_missing_file_is_diffusers_to_name(self, folder: Path, read: Callable[[Path], Any]) -> None:
        last = shards(folder)[-1]
        last.unlink()
        with pytest.raises(OSError, match=last.name):
            read(folder)


def test_a_shard_in_full_precision_among_int8_ones(own: Callable[[str], Path], saved: Path) -> None:
    folder = own("int8 shards")
    full = load_file(saved / "float" / WEIGHTS)
    edit(shards(folder)[0], lambda tensors: tensors.update({name: full[name] for name in tensors if name in full}))
    with pytest.raises(QVDError, match=r"is float32 .* expected int8"):
        load(folder)


def test_an_int8_shard_among_full_precision_ones(own: Callable[[str], Path], saved: Path) -> None:
    folder = own("float shards")
    codes = load_file(saved / "int8" / WEIGHTS)
    edit(shards(folder)[0], lambda tensors: tensors.update({name: codes[name].clone() for name in tensors}))
    with pytest.raises(QVDError, match="this checkpoint is quantized already"):
        quantize(folder)


# config.json and weights of different models


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 4}, r"is int8 .* expected uint8"),
        ({"weight_bits": 6}, "holds codes of more than the 6 bits"),
        ({"activation_bits": 4}, r"time_proj\.\w+ is float32 \[25\d\]"),
        ({"activation": "static"}, "have no activation scales"),
    ],
    ids=str,
)
def test_settings_the_weights_were_not_made_with(
    settings: dict[str, Any], message: str, own: Callable[[str], Path]
) -> None:
    folder = own("int8")
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(settings))
    with pytest.raises(QVDError, match=message):
        load(folder)


@pytest.mark.parametrize("planned", [True, False])
def test_the_config_of_a_save_that_kept_other_layers(planned: bool, own: Callable[[str], Path]) -> None:
    folder = own("int8")
    if planned:  # the config plans what the weights do not have
        edit(folder, lambda tensors: tensors.pop("blocks.1.attn1.to_q.weight_scale"))
        message = r"lacks blocks\.1\.attn1\.to_q\.weight_scale"
    else:
        edit_json(folder / "config.json", lambda config: config["quantization_config"]["layers"].pop(LAYER))
        message = rf"holds {LAYER}\.weight_scale, which config\.json does not plan"
    with pytest.raises(QVDError, match=message):
        load(folder)


def test_weights_and_config_of_which_one_is_in_full_precision(own: Callable[[str], Path], saved: Path) -> None:
    folder = own("float")
    shutil.copy(saved / "int8" / "config.json", folder)
    with pytest.raises(QVDError, match=r"lacks blocks.*weight_scale"):
        load(folder)
    folder = own("int8")
    shutil.copy(saved / "float" / "config.json", folder)
    with pytest.raises(QVDError, match="this checkpoint is quantized already"):
        quantize(folder)


def test_int8_weights_without_a_config_entry_are_said_by_diffusers_alone(
    own: Callable[[str], Path], saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing calls QVD then. The one sign is the warning that every weight_scale was left out."""
    folder = own("int8")
    shutil.copy(saved / "float" / "config.json", folder)
    logging.enable_propagation()
    try:
        model = load(folder)
    finally:
        logging.disable_propagation()
    assert f"{LAYER}.weight_scale" in caplog.text and "not used" in caplog.text
    assert model.get_submodule(LAYER).weight.abs().max() > 100  # codes, taken for weights


@pytest.mark.parametrize("pad", [1, 2, 3])
def test_tensors_at_odd_places_of_a_file(pad: int, own: Callable[[str], Path], saved: Path) -> None:
    folder = own("int8")
    content = (folder / WEIGHTS).read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    padded = struct.pack("<Q", header + pad) + content[8 : 8 + header] + b" " * pad + content[8 + header :]
    (folder / WEIGHTS).write_bytes(padded)
    expected = load(saved / "int8").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).state_dict().items())
