"""QVD's single file for ComfyUI: what is saved is loaded bit for bit, and nothing damaged reaches a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.supported_models
import pytest
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qvd_core.files
from qvd_core import QuantSpec
from qvd_core.errors import QVDError
from qvd_nodes.checkpoint import load_patcher, save_patcher
from qvd_nodes.export import export_patcher
from qvd_nodes.layers import quantized_layers
from qvd_nodes.quantize import quantize_patcher
from qvd_nodes.record import Record, record_of
from qvd_nodes.weights import denoiser
from tests.nodes import models

FAST = QuantSpec(temporal_quantizer="power")
LAYERS = ["blocks.0.self_attn.v", "blocks.1.ffn.0", "time_projection.1", "head.head"]


KINDS = [models.WanConfig, models.OneBlockConfig, models.ConvolutionsConfig]


@pytest.fixture(autouse=True)
def known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.supported_models, "models", KINDS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, scales_for: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; to be copied before they are changed."""
    scales = scales_for(activation="static_bucket")
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    save_patcher(quantize_patcher(models.patcher(models.WanConfig), scales.spec, scales), path)
    return load_file(path), metadata_of(path)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def bits(model: ModelPatcher) -> dict[str, Tensor]:
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in denoiser(model).state_dict().items()}


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("config", "fields"),
        [
            (models.OneBlockConfig, None),
            (models.OneBlockConfig, {}),
            (models.OneBlockConfig, {"weight_bits": 6, "activation_bits": 6, "rounding": "nearest"}),
            (models.OneBlockConfig, {"weight_bits": 4, "rotate": True}),
            (models.OneBlockConfig, {"activation": "static"}),
            (models.OneBlockConfig, {"activation": "static_bucket"}),
            (models.OneBlockConfig, {"activation": "static_frame"}),
            (models.OneBlockConfig, {"portable": True}),
            (models.ConvolutionsConfig, None),
            (models.ConvolutionsConfig, {"activation": "static"}),
            (models.ConvolutionsConfig, {"weight_bits": 4, "rounding": "nearest"}),
        ],
        ids=str,
    )
    def test_bit_for_bit(self, config: Any, fields: dict[str, Any] | None, tmp_path: Path, scales_for: Any) -> None:
        scales = None if fields is None else scales_for(config, **fields)
        quantized = quantize_patcher(models.patcher(config), FAST if scales is None else scales.spec, scales)
        loaded = load_patcher(save_patcher(quantized, tmp_path / "a.safetensors"))
        before, after = bits(quantized), bits(loaded)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(models.sample(loaded), models.sample(quantized))
        assert record_of(loaded) == record_of(quantized)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_of_16_bits(self, dtype: torch.dtype, tmp_path: Path) -> None:
        quantized = quantize_patcher(models.patcher(models.WanConfig, dtype), FAST)
        loaded = load_patcher(save_patcher(quantized, tmp_path / "a.safetensors"))
        assert {tensor.dtype for tensor in loaded.model.parameters()} == {dtype}
        assert torch.equal(models.sample(loaded), models.sample(quantized))

    def test_loras_are_merged_into_the_file_and_not_into_the_model(
        self, wan: ModelPatcher, tmp_path: Path, scales_for: Any
    ) -> None:
        scales = scales_for()
        patched = models.with_lora(quantize_patcher(wan, scales.spec, scales), LAYERS)
        expected = models.sample(patched)
        loaded = load_patcher(save_patcher(patched, tmp_path / "a.safetensors"))
        assert torch.equal(models.sample(loaded), expected) and not loaded.patches
        assert torch.equal(models.sample(patched), expected) and len(patched.patches) == len(LAYERS)

    def test_saved_again_it_is_the_same_file(self, saved: Any, tmp_path: Path) -> None:
        first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        save_file(*saved[:1], first, saved[1])
        save_patcher(load_patcher(first), second)
        tensors = load_file(second)
        assert tensors.keys() == saved[0].keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in saved[0].items())
        assert json.loads(metadata_of(second)["qvd"]) == json.loads(saved[1]["qvd"])

    def test_a_loaded_model_takes_loras_and_can_be_made_anew(self, saved: Any, tmp_path: Path) -> None:
        save_file(saved[0], tmp_path / "a.safetensors", saved[1])
        loaded = load_patcher(tmp_path / "a.safetensors")
        patched = models.with_lora(loaded, LAYERS)
        assert not torch.equal(models.sample(patched), models.sample(loaded))
        deep = patched.clone(force_deepcopy=True)
        assert torch.equal(models.sample(deep), models.sample(patched))

    def test_below_the_prefix_of_a_whole_checkpoint(self, saved: Any, tmp_path: Path) -> None:
        save_file(saved[0], tmp_path / "a.safetensors", saved[1])
        renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in saved[0].items()}
        save_file(renamed, tmp_path / "b.safetensors", saved[1])
        found = [models.sample(load_patcher(tmp_path / f"{name}.safetensors")) for name in "ab"]
        assert torch.equal(*found)

    def test_the_metadata_of_the_float_file_comes_along(self, wan: ModelPatcher, tmp_path: Path) -> None:
        source = tmp_path / "float.safetensors"
        save_file({"a": torch.zeros(1)}, source, {"config": '{"vae": 1}', "format": "pt"})
        wan.cached_patcher_init = (lambda path: None, (str(source),))
        path = save_patcher(quantize_patcher(wan, FAST), tmp_path / "a.safetensors")
        assert metadata_of(path)["config"] == '{"vae": 1}'
        assert record_of(load_patcher(path)).file_metadata == {"config": '{"vae": 1}'}

    def test_interrupted_it_leaves_no_file(self, wan: ModelPatcher, tmp_path: Path) -> None:
        quantized = quantize_patcher(wan, FAST)
        before = models.snapshot(quantized)
        model_management.interrupt_current_processing()
        with pytest.raises(model_management.InterruptProcessingException):
            save_patcher(quantized, tmp_path / "a.safetensors")
        assert not list(tmp_path.glob("*.safetensors*")) and models.unchanged(quantized, before)

    @pytest.mark.parametrize("save", [save_patcher, export_patcher])
    def test_a_full_disk_leaves_no_file(
        self, save: Any, wan: ModelPatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(tensors: Any, path: Path, metadata: Any) -> None:
            path.write_bytes(b"the beginning")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(qvd_core.files, "save_file", full)
        with pytest.raises(QVDError, match="No space left on device"):
            save(quantize_patcher(wan, FAST), tmp_path / "out" / "a.safetensors")
        assert not list((tmp_path / "out").iterdir())

    def test_a_float_model_is_refused(self, wan: ModelPatcher, tmp_path: Path) -> None:
        with pytest.raises(QVDError, match="not quantized by QVD: connect the output of QVD Quantize Model"):
            save_patcher(wan, tmp_path / "a.safetensors")


LAYER = "blocks.1.ffn.0"  # static by timestep, with shift and scale


def entry(tensors: dict[str, Tensor], layer: str = LAYER) -> dict[str, Any]:
    return json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))


def with_entry(tensors: dict[str, Tensor], layer: str = LAYER, **changes: Any) -> None:
    text = json.dumps({**entry(tensors, layer), **changes})
    tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def damage(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors[name] = change(tensors[name])

    return damage


def _described(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: with_entry(tensors, **changes)


def _metadata(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def damage(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["qvd"] = json.dumps({**json.loads(metadata["qvd"]), **changes})

    return damage


def _text(text: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: metadata.update(qvd=text)


def _spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return spoil


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], object], str]] = {
    "codes of another type": (_replace(f"{LAYER}.weight", lambda t: t.float()), "expected torch.int8"),
    "codes of another shape": (_replace(f"{LAYER}.weight", lambda t: t[:-1].clone()), r"expected .*\[64, 32\]"),
    "a scale of another shape": (_replace(f"{LAYER}.weight_scale", lambda t: t[:-1].clone()), "weight_scale"),
    "a scale of another type": (_replace(f"{LAYER}.weight_scale", lambda t: t.half()), "weight_scale"),
    "a scale of zero": (_replace(f"{LAYER}.weight_scale", _spoiled(0.0)), "must be positive"),
    "a scale of NaN": (_replace(f"{LAYER}.weight_scale", _spoiled(float("nan"))), "NaN"),
    "a shift of infinity": (_replace(f"{LAYER}.input_shift", _spoiled(float("inf"))), "NaN or infinity"),
    "an input scale below zero": (_replace(f"{LAYER}.input_scale", _spoiled(-1.0)), "must be positive"),
    "steps below zero": (_replace(f"{LAYER}.activation_scale", _spoiled(-1.0)), "must be positive"),
    "boundaries of NaN": (_replace(f"{LAYER}.bucket_boundaries", _spoiled(float("nan"))), "NaN or infinity"),
    "levels that fall": (_replace("time_projection.1.levels", lambda t: t.flip(0)), "must ascend"),
    "a gain of zero": (_replace("time_projection.1.gain", _spoiled(0.0)), "must be positive"),
    "no scale": (lambda t, m: t.pop(f"{LAYER}.weight_scale"), "lacks its weight_scale"),
    "no shift": (lambda t, m: t.pop(f"{LAYER}.input_shift"), "lacks its input_shift"),
    "no bias": (lambda t, m: t.pop(f"{LAYER}.bias"), "lacks its bias"),
    "no codes": (lambda t, m: t.pop(f"{LAYER}.weight"), "lacks its weight"),
    "no codebook": (lambda t, m: t.pop("time_projection.1.offset"), "lacks its offset"),
    "a float weight is missing": (lambda t, m: t.pop("head.head.weight"), "lacks 1 tensors .*head.head.weight"),
    "a whole layer is missing": (
        lambda t, m: [t.pop(name) for name in list(t) if name.startswith(f"{LAYER}.")],
        "lacks 2 tensors",
    ),
    "a whole block is missing": (
        lambda t, m: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")],
        "lacks|makes a model of|does not know",
    ),
    "a description of another type": (_replace(f"{LAYER}.comfy_quant", lambda t: t.float()), "description of"),
    "a huge description": (
        _replace(f"{LAYER}.comfy_quant", lambda t: torch.zeros(10**6, dtype=torch.uint8)),
        "description of",
    ),
    "no JSON": (_replace(f"{LAYER}.comfy_quant", lambda t: torch.full((9,), 200, dtype=torch.uint8)), "cannot read"),
    "deep JSON": (
        _replace(f"{LAYER}.comfy_quant", lambda t: torch.frombuffer(bytearray(b"[" * 60000), dtype=torch.uint8)),
        "cannot read",
    ),
    "another format": (_described(format="int8_tensorwise"), "cannot read"),
    "another version": (_described(version=2), "cannot read"),
    "a shape of text": (_described(shape="large"), "is said to have the shape"),
    "a shape of one": (_described(shape=[5]), "is said to have the shape"),
    "a shape with a zero": (_described(shape=[64, 0]), "is said to have the shape"),
    "a shape with true": (_described(shape=[True, 32]), "is said to have the shape"),
    "another shape": (_described(shape=[64, 33]), "expected"),
    "unknown settings": (_described(spec={"weight_bits": 3}), "settings that this QVD does not know"),
    "settings of no kind": (_described(spec=5), "settings that this QVD does not know"),
    "an unknown plan": (_described(plan=["sparse"]), "plan"),
    "a plan of no kind": (_described(plan=7), "plan"),
    "many steps": (_described(plan=["linear", "bias", "activation_scale", "steps:4000:timestep"]), "expected"),
    "codes without a description": (lambda t, m: t.pop(f"{LAYER}.comfy_quant"), "belongs to no int8 layer"),
    "a bias of one value": (_replace(f"{LAYER}.bias", lambda t: t[:1].clone()), "has a bias of"),
    "an integer bias": (_replace(f"{LAYER}.bias", lambda t: t.to(torch.int8)), "has a bias of"),
    "a kept layer of NaN": (_replace("head.head.weight", _spoiled(float("nan"))), "NaN or infinity"),
    "a scale beyond any weight": (_replace(f"{LAYER}.weight_scale", _spoiled(3e38)), "beyond any weight"),
    "a convolution of two dimensions": (_described(plan=["conv2d", "bias"]), "dimensions|lacks|belongs"),
    "no JSON in the metadata": (_text("{"), "an int8 file of another program"),
    "deep JSON in the metadata": (_text(DEEP), "an int8 file of another program"),
    "a list in the metadata": (_text("[]"), "an int8 file of another program"),
    "a newer file": (_metadata(version=2), "has format 2, this QVD reads up to 1: update QVD"),
    "a version of text": (_metadata(version="one"), "has format one"),
    "a file of diffusers": (_metadata(kind="scales"), "an int8 file of another program"),
    "an unknown setting": (_metadata(spec={"weight_bits": 99}), "description is damaged"),
    "a report of text": (_metadata(report={"a": "b"}), "description is damaged"),
    "sizes of text": (_metadata(float_bytes="many"), "description is damaged"),
}


class TestHostile:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_is_refused_in_one_line(self, damage: Any, saved: Any, tmp_path: Path) -> None:
        tensors, metadata = dict(saved[0]), dict(saved[1])
        damage[0](tensors, metadata)
        path = tmp_path / "a.safetensors"
        save_file(tensors, path, metadata)
        with pytest.raises(QVDError, match=damage[1]) as caught:
            load_patcher(path)
        assert str(path) in str(caught.value) or "file" in str(caught.value)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)

    def test_without_metadata_the_layers_tell_what_they_are(self, saved: Any, tmp_path: Path) -> None:
        """Other programs, and ComfyUI's own save nodes, write none."""
        save_file(saved[0], tmp_path / "a.safetensors", saved[1])
        save_file(saved[0], tmp_path / "b.safetensors")
        described, bare = (load_patcher(tmp_path / f"{name}.safetensors") for name in "ab")
        one, other = described.model.state_dict(), bare.model.state_dict()
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
        assert record_of(bare).spec == record_of(described).spec

    @pytest.mark.parametrize("keep", [0, 4, 8, 1000, -1])
    def test_cut_short(self, keep: int, saved: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file(saved[0], path, saved[1])
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(QVDError, match="damaged or no safetensors file"):
            load_patcher(path)

    def test_none_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(QVDError, match="does not exist"):
            load_patcher(tmp_path / "a.safetensors")
        with pytest.raises(QVDError, match="does not exist"):
            load_patcher(tmp_path)

    def test_a_float_file(self, wan: ModelPatcher, tmp_path: Path) -> None:
        save_file({name: t.clone() for name, t in denoiser(wan).state_dict().items()}, tmp_path / "a.safetensors")
        with pytest.raises(QVDError, match="no int8 file of QVD: load it with ComfyUI's own Load Diffusion Model"):
            load_patcher(tmp_path / "a.safetensors")

    def test_a_model_that_comfyui_does_not_know(
        self, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_file(saved[0], tmp_path / "a.safetensors", saved[1])
        monkeypatch.setattr(comfy.supported_models, "models", [])
        with pytest.raises(QVDError, match="update ComfyUI"):
            load_patcher(tmp_path / "a.safetensors")

    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_bytes_changed_anywhere_give_a_model_or_one_line(self, data: Any, saved: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file(saved[0], path, saved[1])
        content = bytearray(path.read_bytes())
        header = int.from_bytes(content[:8], "little") + 8
        for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            load_patcher(path)
        except QVDError as error:
            assert "\n" not in str(error)


class TestRecordValues:
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=8,
        ),
        st.sampled_from(["spec", "family", "float_bytes", "layers_in_all", "report", "calibrated_on"]),
    )
    def test_anything_gives_a_record_or_one_line(self, value: Any, key: str) -> None:
        good = Record(QuantSpec(), "Wan", 3, 2).to_dict()
        try:
            record = Record.from_dict({**good, key: value}, {})
        except QVDError as error:
            assert "damaged, or from a newer QVD" in str(error)
        else:
            assert isinstance(record.float_bytes, int) and isinstance(record.spec, QuantSpec)

    def test_there_and_back(self) -> None:
        record = Record(QuantSpec(weight_bits=4), "Wan", 3, 2, {"a": {"sqnr_db": 1.5}}, {"prompts": 2}, {"config": "x"})
        assert Record.from_dict(json.loads(json.dumps(record.to_dict())), {"config": "x"}) == record


class TestExport:
    @pytest.mark.parametrize("portable", [True, False])
    def test_stock_format(self, portable: bool, wan: ModelPatcher, tmp_path: Path, scales_for: Any) -> None:
        scales = scales_for(portable=portable)
        quantized = quantize_patcher(wan, scales.spec, scales)
        expected = models.denoise(quantized)
        path = tmp_path / "a.safetensors"
        export = export_patcher(quantized, path)
        tensors = load_file(path)
        layers = quantized_layers(denoiser(quantized))
        temporal = {"time_projection.1"}
        assert set(export.in_float) == temporal
        assert set(export.unchanged if portable else export.again) == set(layers) - temporal
        for name in export.unchanged + export.again:
            assert json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
            assert tensors[f"{name}.weight"].dtype == torch.int8
            assert tensors[f"{name}.weight_scale"].shape == (len(tensors[f"{name}.weight"]), 1)
        assert not [name for name in tensors if name.endswith(("input_shift", "levels", "activation_scale"))]
        # What a stock ComfyUI makes of it: dynamic int8, here with its weights in float.
        plain = {name: tensor for name, tensor in tensors.items() if "weight_scale" not in name}
        for name in export.unchanged + export.again:
            plain[f"{name}.weight"] = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        stock = models.patcher(models.WanConfig)
        denoiser(stock).load_state_dict({k: v for k, v in plain.items() if not k.endswith("comfy_quant")})
        assert models.sqnr_db(models.denoise(stock), models.denoise(wan)) > 30
        assert models.sqnr_db(models.denoise(stock), expected) > 25
        assert bool(export.warnings()) and ("portable=True" in export.warnings()[0]) is not portable

    def test_four_bits_and_convolutions(self, convolutions: ModelPatcher, tmp_path: Path, scales_for: Any) -> None:
        scales = scales_for(models.ConvolutionsConfig, weight_bits=4, rounding="nearest")
        quantized = quantize_patcher(convolutions, scales.spec, scales)
        export = export_patcher(quantized, tmp_path / "a.safetensors")
        assert (export.again, sorted(export.in_float)) == (["mix"], ["in_space", "over_time"])
        tensors = load_file(tmp_path / "a.safetensors")
        assert tensors["in_space.weight"].dtype == torch.float32 and tensors["mix.weight"].dtype == torch.int8
        denoiser(convolutions).in_space.load_state_dict(
            {"weight": tensors["in_space.weight"], "bias": tensors["in_space.bias"]}
        )
        assert models.sqnr_db(models.denoise(convolutions), models.denoise(quantized)) > 12

    def test_loras_are_merged(self, wan: ModelPatcher, tmp_path: Path) -> None:
        quantized = quantize_patcher(wan, FAST)
        patched = models.with_lora(quantized, ["blocks.1.ffn.0", "head.head"])
        export_patcher(quantized, tmp_path / "a.safetensors")
        export_patcher(patched, tmp_path / "b.safetensors")
        plain, changed = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
        names = {name for name in plain if not torch.equal(plain[name], changed[name])}
        assert names == {"blocks.1.ffn.0.weight", "blocks.1.ffn.0.weight_scale", "head.head.weight"}

    def test_is_no_file_for_our_loader(self, wan: ModelPatcher, tmp_path: Path) -> None:
        export_patcher(quantize_patcher(wan, FAST), tmp_path / "a.safetensors")
        with pytest.raises(QVDError, match="load it with ComfyUI's own"):
            load_patcher(tmp_path / "a.safetensors")

    def test_a_float_model_is_refused(self, wan: ModelPatcher, tmp_path: Path) -> None:
        with pytest.raises(QVDError, match="not quantized by QVD"):
            export_patcher(wan, tmp_path / "a.safetensors")
