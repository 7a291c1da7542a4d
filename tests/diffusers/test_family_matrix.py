"""Every video model class of diffusers: quantized, run, saved, loaded again, compiled. The columns are in matrix.py."""

from __future__ import annotations

import copy
import logging
import re
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from benchmarks.family_matrix import ENTRY, FAILS, TEMPORAL
from qvd_core import QuantSpec, find_family, quantize_model
from qvd_core.families import FAMILIES
from qvd_core.quality import sqnr_db
from tests.diffusers.matrix import COLUMNS, COMPILE, LEAST_SQNR, ColumnError, Subject
from tests.tiny_models import CLASS_OF, TINY_FAMILIES, TinyFamily, missing_class, tiny_family
from tests.tiny_models.base import randomized
from tests.tiny_models.classes import VIDEO_CLASSES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CHEAP = [column for column in COLUMNS if column != COMPILE]
COMPILED_EVERY_TIME = (
    "LTXVideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
)  # one that can, one that cannot


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    """One subject per tiny model for the whole file: saved once, quantized once."""

    @cache
    def subject(name: str) -> Subject:
        return Subject(name, tmp_path_factory.mktemp(name))

    def of_class(class_name: str) -> Subject:
        name = VIDEO_CLASSES[class_name][0]
        missing = missing_class(name)
        if missing:
            pytest.skip(missing)
        return subject(name)

    return of_class


@pytest.mark.parametrize("column", CHEAP)
@pytest.mark.parametrize("class_name", VIDEO_CLASSES)
def test_column(class_name, column, subject_of):
    assert COLUMNS[column](subject_of(class_name))


@pytest.mark.parametrize(
    "class_name",
    [name if name in COMPILED_EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in VIDEO_CLASSES],
)
def test_compile(class_name, subject_of):
    assert COLUMNS[COMPILE](subject_of(class_name))


class TestColumnsCanFail:
    """What makes a column fail, on a model that was tampered with."""

    @pytest.fixture
    def subject(self, tmp_path) -> Subject:
        return Subject("hunyuan", tmp_path)

    def test_accuracy(self, subject):
        with torch.no_grad():
            subject.quantized.transformer_blocks[0].ff.net[2].weight_scale.mul_(4.0)
        with pytest.raises(ColumnError, match="dB to full precision, less than 25"):
            COLUMNS["SQNR"](subject)

    def test_finite(self, subject):
        with torch.no_grad():
            subject.quantized.proj_out.bias.fill_(torch.nan)
        with pytest.raises(ColumnError, match="not finite"):
            COLUMNS["finite"](subject)

    def test_reload(self, subject):
        assert COLUMNS["save"](subject)
        with torch.no_grad():
            subject.quantized.proj_out.bias[0] += 1.0
        with pytest.raises(ColumnError, match=r"proj_out\.bias is not the tensor that was saved"):
            COLUMNS["save"](subject)

    def test_another_function_of_the_same_codes(self, subject):
        """One layer's scales 5 % off, after the output to compare with was taken."""
        assert COLUMNS["SQNR"](subject)
        model = copy.deepcopy(subject.quantized)
        with torch.no_grad():
            model.transformer_blocks[1].ff.net[2].weight_scale.mul_(1.05)
        subject.load = lambda folder, **options: model
        subject.quantized = model
        with pytest.raises(ColumnError, match="the same codes give another output"):
            COLUMNS["save"](subject)

    def test_nothing_quantized(self, subject):
        subject.quantized = copy.deepcopy(subject.tiny.model)
        with pytest.raises(ColumnError, match="no layer"):
            COLUMNS["quantized"](subject)

    def test_a_limit_that_only_the_quantized_model_has(self, subject, monkeypatch):
        """It is no upstream limit, and is raised as it is."""
        load = subject.load

        def refuse(folder, **options):
            if "device_map" in options and folder.name == "int8":
                raise ValueError("only here")
            return load(folder, **options)

        monkeypatch.setattr(subject, "load", refuse)
        with pytest.raises(ValueError, match="only here"):
            COLUMNS['device_map="auto"'](subject)

    def test_another_limit_than_upstream_has(self, subject, monkeypatch):
        def refuse(folder, **options):
            raise ValueError(f"no {folder.name}")

        assert subject.quantized is not None and subject.quantized_folder.is_dir()
        monkeypatch.setattr(subject, "load", refuse)
        with pytest.raises(ColumnError, match="'no int8', but the float model says 'no float'"):
            COLUMNS['device_map="auto"'](subject)


class TestCoverage:
    def test_every_class_has_an_entry_of_its_own(self):
        named = [name for family in FAMILIES for name in family.classes]
        assert sorted(named) == sorted(VIDEO_CLASSES) and len(VIDEO_CLASSES) == 39

    def test_every_tiny_model_belongs_to_its_class(self):
        assert set(TINY_FAMILIES) == {name for name in CLASS_OF if missing_class(name) is None}
        for name in TINY_FAMILIES:
            assert type(tiny_family(name).model).__name__ == CLASS_OF[name]

    def test_every_class_that_looks_like_a_video_denoiser_is_listed(self):
        """A class that a later diffusers adds shows here; two are no denoisers of videos."""
        pattern = re.compile(r"(3DModel|3DConditionModel|Video\w*Model|Motion\w*Model|MotionAdapter|TemporalModel)$")
        found = {
            name for name in dir(diffusers) if pattern.search(name) and not name.startswith(("Autoencoder", "Multi"))
        }
        others = {"JoyImageEditPlusTransformer3DModel", "LTX2VideoDiffusionDecoderModel"}
        if diffusers.__version__.startswith("0.42."):
            assert found - others <= set(VIDEO_CLASSES)
        assert len(found) > 15

    def test_the_page_is_of_these_classes_and_columns_and_green(self):
        lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert header == ["class", ENTRY, TEMPORAL, *COLUMNS]
        assert [row[0] for row in body] == list(VIDEO_CLASSES)
        for class_name, entry, _, *cells in body:
            assert entry == find_family(class_name).name
            assert len(cells) == len(COLUMNS) and not [cell for cell in cells if FAILS in cell or cell == "not run"]
            assert float(cells[list(COLUMNS).index("SQNR")].removesuffix(" dB")) >= LEAST_SQNR


@pytest.fixture(scope="module")
def tomorrow() -> TinyFamily:
    """Wan, wide enough for the generic rule, under a name that no entry has."""
    unknown = type("TomorrowTransformer3DModel", (diffusers.WanTransformer3DModel,), {})
    model = unknown(num_attention_heads=4, attention_head_dim=16, ffn_dim=96, text_dim=64, freq_dim=64, num_layers=1)
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))

    def call(model: nn.Module, latents: torch.Tensor, timestep: float) -> torch.Tensor:
        return model(latents, torch.tensor([timestep]), text).sample

    return TinyFamily(randomized(model), torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1)), call)


class TestClassesOfTomorrow:
    def test_the_generic_rule_says_so_in_one_line_and_works(self, tomorrow, caplog):
        model = copy.deepcopy(tomorrow.model)
        with caplog.at_level(logging.WARNING, logger="qvd_core"):
            quantize_model(model, QuantSpec())
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1 and "TomorrowTransformer3DModel" in lines[0] and "generic rule" in lines[0]
        with torch.no_grad():
            expected, output = tomorrow.forward(tomorrow.model), tomorrow.forward(model)
        assert LEAST_SQNR <= sqnr_db(expected, output) < 100.0
        assert model.blocks[0].ffn.net[2].weight.dtype == torch.int8
        assert model.patch_embedding.weight.is_floating_point() and model.proj_out.weight.is_floating_point()
