"""`Scales`: bit-equal round trips, and one QVDError for every file that is not what `save` wrote."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qvd_core import QuantSpec, QVDError, Scales
from qvd_core.files import read_tensors
from qvd_core.fingerprint import weight_probe
from qvd_core.scales import FORMAT_VERSION, LayerScales, check_layer_scales
from qvd_core.temporal import fit_temporal_quantizer

OPTIONAL = ("static_step", "bucket_steps", "bucket_boundaries", "frame_steps")
REQUIRED = tuple(
    item.name for item in fields(LayerScales) if item.name not in (*OPTIONAL, "frame_order", "rotation", "rows_of")
)


def small_scales() -> Scales:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(6, generator=generator)
    layer = LayerScales(low, low + 2, low + 1.1, low + 1, torch.rand(6, generator=generator) + 0.5, low[:4])
    features = torch.randn(8, 5, generator=generator)
    codebooks = {kind: fit_temporal_quantizer(features, quantizer=kind).quantizer for kind in ("channel", "power")}
    return Scales(
        "WanTransformer3DModel",
        "f" * 32,
        QuantSpec(weight_bits=6, modules_to_not_convert=("blocks.0",)),
        layers={"blocks.1.to_q": layer, "blocks.1.to_k": replace(layer)},  # one memory for both
        temporal={"time.channel": codebooks["channel"], "time.power": codebooks["power"]},
        report={"blocks.1.to_q": {"sqnr_db": 41.5}, "blocks.1.to_k": {"sqnr_db": 42.5, "coverage": 0.1}},
        calibrated_on={"prompts": ["a σ"], "steps": 25},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small_scales().save(tmp_path / "scales.safetensors")


def assert_equal(one: Scales, two: Scales) -> None:
    for field in ("model_class", "fingerprint", "spec", "report", "calibrated_on"):
        assert getattr(one, field) == getattr(two, field)
    for part in ("layers", "temporal"):
        assert getattr(one, part).keys() == getattr(two, part).keys()
        for name, held in getattr(one, part).items():
            for key, value in vars(held).items():
                other = getattr(getattr(two, part)[name], key)
                assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (name, key)


class TestRoundTrip:
    def test_small(self, path):
        assert_equal(small_scales(), Scales.load(path))

    def test_calibrated(self, denoiser, scales, tmp_path):
        assert_equal(scales, Scales.load(scales.save(tmp_path / "a.safetensors")))

    def test_saving_what_was_loaded_gives_the_same_file(self, path, tmp_path):
        (tensors, description), (again, second) = (
            read_tensors(file, "scales") for file in (path, Scales.load(path).save(tmp_path / "again"))
        )
        assert description == second and tensors.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())

    def test_nothing_calibrated(self, tmp_path):
        empty = Scales("M", "0", QuantSpec())
        assert_equal(empty, Scales.load(empty.save(tmp_path / "a")))


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Replace tensors (None: drop) and description entries of a scales file."""
    held, description = read_tensors(path, "scales")
    for name, tensor in (tensors or {}).items():
        held[name] = tensor
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, path, {"qvd": json.dumps(description | changes)})


class TestSteps:
    """What format 2 added: steps per timestep and frame, rotation, and samples of inputs."""

    def with_steps(self) -> Scales:
        scales = small_scales()
        held = replace(
            scales.layers["blocks.1.to_q"],
            static_step=torch.tensor([0.3]),
            bucket_steps=torch.tensor([0.1, 0.3]),
            bucket_boundaries=torch.tensor([450.0]),
            frame_steps=torch.tensor([0.1, 0.2, 0.3]),
            frame_order="minor",
            rotation=2,
            rows_of="blocks.1.to_q",
        )
        layers = {"blocks.1.to_q": held, "blocks.1.to_k": replace(held)}
        return replace(scales, layers=layers, rows={"blocks.1.to_q": torch.randn(5, 12).bfloat16()})

    def test_round_trip_with_every_field(self, tmp_path):
        scales = self.with_steps()
        again = Scales.load(scales.save(tmp_path / "a"))
        assert_equal(scales, again)
        assert scales.rows.keys() == again.rows.keys()
        assert torch.equal(scales.rows["blocks.1.to_q"], again.rows["blocks.1.to_q"])

    def test_files_of_version_1_are_read(self, path):
        """It listed its layers by name, and knew of no steps."""
        rewrite(path, version=1, layers=["blocks.1.to_k", "blocks.1.to_q"])
        assert_equal(small_scales(), Scales.load(path))

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("static_step", torch.tensor([0.1, 0.2]), "static_step has 2 values"),
            ("static_step", torch.zeros(1), "static_step must be positive"),
            ("bucket_steps", torch.tensor([0.1, -0.3]), "bucket_steps must be positive"),
            ("bucket_steps", torch.zeros(0), "bucket_steps must be positive"),
            ("bucket_steps", None, "without the other"),
            ("bucket_boundaries", None, "without the other"),
            ("bucket_boundaries", torch.tensor([1.0, 2.0]), "must ascend, one fewer than the 2"),
            ("frame_steps", torch.full((3,), torch.nan), "frame_steps holds NaN"),
            ("rows", torch.zeros(5, 7).bfloat16(), r"sample of layer .* is \[5, 7\]"),
            ("rows", torch.zeros(0, 6).bfloat16(), "sample of layer"),
            ("rows", torch.full((5, 6), torch.nan).bfloat16(), "or holds NaN"),
            ("rows", torch.zeros(5, 6), "or holds NaN"),
            ("rows", None, "missing"),
        ],
    )
    def test_bad_tensors(self, tmp_path, field, value, message):
        path = self.with_steps().save(tmp_path / "a")
        rewrite(path, {f"blocks.1.to_q.{field}": value})
        with pytest.raises(QVDError, match=message):
            Scales.load(path)

    def test_boundaries_must_ascend(self, tmp_path):
        path = self.with_steps().save(tmp_path / "a")
        layer = "blocks.1.to_q"
        rewrite(path, {f"{layer}.bucket_steps": torch.ones(3), f"{layer}.bucket_boundaries": torch.tensor([2.0, 1.0])})
        with pytest.raises(QVDError, match="must ascend"):
            Scales.load(path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rotation": 4}, "not a power of two that divides 6"),
            ({"rotation": -2}, "not a power of two"),
            ({"rotation": 2.0}, "unknown setting rotation"),
            ({"rotation": True}, "unknown setting rotation"),
            ({"frame_order": "sideways"}, "expected major or minor"),
            ({"frame_order": ""}, "expected major or minor"),
            ({"rows_of": 3}, "unknown setting rows_of"),
            ({"rows_of": "nobody"}, "missing"),
            ({"surprise": 1}, "unknown setting surprise"),
        ],
    )
    def test_bad_settings(self, tmp_path, settings, message):
        path = self.with_steps().save(tmp_path / "a")
        _, description = read_tensors(path, "scales")
        own = description["layers"]["blocks.1.to_q"]
        rewrite(path, layers={"blocks.1.to_q": own | settings})
        with pytest.raises(QVDError, match=message):
            Scales.load(path)


class TestBadFiles:
    def refuses(self, path: Path, message: str) -> None:
        with pytest.raises(QVDError, match=message) as caught:
            Scales.load(path)
        assert "\n" not in str(caught.value)

    def test_missing(self, tmp_path):
        self.refuses(tmp_path / "none.safetensors", "does not exist")

    def test_truncated(self, path):
        path.write_bytes(path.read_bytes()[:-10])
        self.refuses(path, "damaged")

    @pytest.mark.parametrize("changes", [{"kind": "checkpoint"}, {"kind": None}, {"version": None}, {"version": "1"}])
    def test_wrong_kind(self, path, changes):
        rewrite(path, **changes)
        self.refuses(path, "not a scales file of QVD")

    def test_newer_version(self, path):
        rewrite(path, version=FORMAT_VERSION + 1)
        self.refuses(path, "update QVD")

    @pytest.mark.parametrize("field", REQUIRED)
    def test_missing_tensor(self, path, field):
        rewrite(path, {f"blocks.1.to_q.{field}": None})
        self.refuses(path, rf"blocks\.1\.to_q lacks {field}")

    @pytest.mark.parametrize("field", [*REQUIRED, *OPTIONAL])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_not_finite(self, path, field, bad):
        value = torch.ones(6)
        value[2] = bad
        rewrite(path, {f"blocks.1.to_q.{field}": value})
        self.refuses(path, f"{field} holds NaN or infinity")

    @pytest.mark.parametrize("value", [torch.ones(5), torch.ones(6, 1), torch.ones(6).half(), torch.ones(())])
    def test_wrong_shape_or_type(self, path, value):
        rewrite(path, {"blocks.1.to_q.input_shift": value})
        self.refuses(path, "input_shift is .*, expected float32")

    @pytest.mark.parametrize("value", [0.0, -1.0])
    def test_scale_not_positive(self, path, value):
        rewrite(path, {"blocks.1.to_q.input_scale": torch.full((6,), value)})
        self.refuses(path, "must be positive")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("time.power.levels", torch.zeros(256)),
            ("time.power.levels", None),
            ("time.power.boundaries", torch.zeros(1)),
            ("time.channel.gain", torch.zeros(5)),
            ("time.channel.offset", torch.full((5,), torch.nan)),
            ("time.power.extra", torch.zeros(1)),
        ],
    )
    def test_bad_codebook(self, path, name, value):
        rewrite(path, {name: value})
        self.refuses(path, "damaged")

    @pytest.mark.parametrize(
        "changes",
        [
            {"layers": 3},
            {"layers": None},
            {"layers": [3]},
            {"layers": ["nobody"]},
            {"layers": "ab"},
            {"layers": [["a"]]},
            {"temporal": []},
            {"temporal": {"time.power": 3}},
            {"temporal": {"time.power": ["power"]}},
            {"temporal": {"time.power": ["power", "8"]}},
            {"temporal": {"time.power": ["power", 10**9]}},
            {"temporal": {"time.power": [["power"], 8]}},
            {"temporal": {"time.power": ["uniform?", 8]}},
            {"temporal": {"nobody": ["power", 8]}},
            {"spec": None},
            {"spec": []},
            {"spec": {"weight_bits": 99}},
            {"spec": {"weight_bits": [8]}},
            {"spec": {"modules_to_not_convert": 3}},
            {"spec": {"unknown": 1}},
            {"report": 3},
            {"report": {"a": 3}},
            {"report": {"a": {"b": "text"}}},
            {"report": {"a": {"b": None}}},
            {"report": {"a": {"b": "nan"}}},
            {"calibrated_on": 3},
            {"calibrated_on": [1, 2]},
        ],
        ids=str,
    )
    def test_hostile_description(self, path, changes):
        rewrite(path, **changes)
        self.refuses(path, "damaged")

    @pytest.mark.parametrize(
        "key", ["model_class", "fingerprint", "spec", "layers", "temporal", "report", "calibrated_on"]
    )
    def test_missing_description(self, path, key):
        tensors, description = read_tensors(path, "scales")
        del description[key]
        save_file(tensors, path, {"qvd": json.dumps(description)})
        self.refuses(path, f"damaged .*{key}")


class TestChecks:
    def test_weights(self):
        weight = torch.randn(8, 16)
        held = replace(small_scales().layers["blocks.1.to_q"], weight_probe=weight_probe(weight))
        scales = replace(small_scales(), layers={"layer": held})
        scales.check_weight("layer", weight.to(torch.bfloat16))
        scales.check_weight("never calibrated", torch.zeros(2, 2))
        with pytest.raises(QVDError, match="weights of layer layer differ"):
            scales.check_weight("layer", torch.randn(8, 16))

    def test_structure(self, wan, unet, wan_scales):
        wan_scales.check_structure(wan.model, dict(wan.model.named_modules()))
        with pytest.raises(QVDError, match="another model"):
            wan_scales.check_structure(unet.model, dict(unet.model.named_modules()))

    def test_summary_is_means(self):
        assert small_scales().summary() == {"layers": 2.0, "temporal_layers": 2.0, "sqnr_db": 42.0, "coverage": 0.1}


@pytest.mark.parametrize(("field", "value"), [("input_scale", 1e-42), ("input_shift", 1e38), ("input_min", 1e9)])
def test_values_that_no_calibration_finds_are_refused(
    wan_scales: Scales, tmp_path: Path, field: str, value: float
) -> None:
    name, layer = next(iter(wan_scales.layers.items()))
    damaged = replace(layer, **{field: torch.full_like(getattr(layer, field), value)})
    path = replace(wan_scales, layers={**wan_scales.layers, name: damaged}).save(tmp_path / "scales.safetensors")
    with pytest.raises(QVDError, match=f"{name}.{field}"):
        Scales.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_steps": torch.ones(3), "frame_order": "major"}, "no static_step"),
        ({"static_step": torch.ones(1), "frame_steps": torch.ones(4097), "frame_order": "major"}, "at most 4096"),
        ({"static_step": torch.ones(1), "bucket_steps": torch.ones(33), "bucket_boundaries": torch.arange(32.0)}, "32"),
        ({"rotation": 1}, "power of two"),
        ({"rotation": 3}, "power of two"),
    ],
)
def test_counts_that_no_calibration_makes_are_refused(changes, message):
    six = torch.zeros(6)
    layer = LayerScales(six, six, six, six, torch.ones(6), torch.ones(4), **changes)
    with pytest.raises(QVDError, match=message):
        check_layer_scales("layer", layer)
