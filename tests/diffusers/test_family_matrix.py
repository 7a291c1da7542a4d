"""Every video model class of diffusers: quantized, run, saved, loaded again, compiled. The columns are in matrix.py."""

from __future__ import annotations

from functools import cache

import pytest

from tests.diffusers.matrix import COLUMNS, Subject
from tests.tiny_models import TINY_FAMILIES, missing_class
from tests.tiny_models.classes import VIDEO_CLASSES

CHEAP = [column for column in COLUMNS if column != "compile fullgraph"]


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    """One subject per tiny model for the whole file: saved once, quantized once."""

    @cache
    def subject(name: str) -> Subject:
        reason = missing_class(name) or (None if name in TINY_FAMILIES else f"no tiny model {name!r} yet")
        if reason:
            pytest.skip(reason)
        return Subject(name, tmp_path_factory.mktemp(name))

    return subject


@pytest.mark.parametrize("column", CHEAP)
@pytest.mark.parametrize("class_name", VIDEO_CLASSES)
def test_column(class_name, column, subject_of):
    assert COLUMNS[column](subject_of(VIDEO_CLASSES[class_name][0]))


@pytest.mark.slow
@pytest.mark.parametrize("class_name", VIDEO_CLASSES)
def test_compile(class_name, subject_of):
    assert COLUMNS["compile fullgraph"](subject_of(VIDEO_CLASSES[class_name][0]))
