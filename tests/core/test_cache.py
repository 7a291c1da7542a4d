"""The scale cache: what was calibrated once is found again, and a bad cache never stops anyone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvd_core import QuantSpec, Scales
from qvd_core.cache import ScaleCache, cache_key, default_cache_folder

SCALES = Scales("M", "0", QuantSpec(), calibrated_on={"prompts": ["a"]})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
)
descriptions = st.dictionaries(st.text(max_size=4), json_values, max_size=4)


class TestKey:
    @given(descriptions)
    def test_order_does_not_matter(self, description):
        assert cache_key(dict(reversed(description.items()))) == cache_key(description)

    @given(descriptions, st.text(max_size=4), st.integers())
    def test_every_entry_matters(self, description, name, value):
        changed = description | {name: value}
        assert (cache_key(changed) == cache_key(description)) == (
            name in description and description[name] == value and type(description[name]) is int
        )

    def test_is_a_file_name(self):
        key = cache_key({"a": "/../\0", "dtype": torch.float16})
        assert key.isalnum() and len(key) == 40
        assert key != cache_key({"a": "/../\0", "dtype": torch.float32})


class TestCache:
    def test_store_and_load(self, tmp_path):
        cache = ScaleCache(tmp_path / "new" / "folder")
        assert cache.load("k") is None
        assert cache.store("k", SCALES) == cache.path("k")
        assert cache.load("k").calibrated_on == SCALES.calibrated_on and cache.load("other") is None

    @pytest.mark.parametrize("content", [b"", b"garbage" * 100])
    def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(self, tmp_path, caplog, content):
        cache = ScaleCache(tmp_path)
        cache.store("k", SCALES)
        cache.path("k").write_bytes(content)
        with caplog.at_level(logging.WARNING, logger="qvd_core"):
            assert cache.load("k") is None
        assert "Ignoring a cached calibration" in caplog.text and len(caplog.records) == 1
        cache.store("k", SCALES)
        assert cache.load("k") is not None

    def test_a_folder_that_cannot_be_written_costs_a_warning(self, tmp_path, caplog):
        (tmp_path / "file").write_text("in the way")
        with caplog.at_level(logging.WARNING, logger="qvd_core"):
            assert ScaleCache(tmp_path / "file").store("k", SCALES) is None
        assert "was not cached" in caplog.text

    def test_what_cannot_be_written_as_json_costs_nothing(self, tmp_path):
        scales = Scales("M", "0", QuantSpec(), calibrated_on={"dtype": torch.bfloat16})
        cache = ScaleCache(tmp_path)
        cache.store("k", scales)
        assert cache.load("k").calibrated_on == {"dtype": "torch.bfloat16"}


class TestFolder:
    def test_qvd_cache_first(self, monkeypatch, tmp_path):
        monkeypatch.setenv("QVD_CACHE", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert default_cache_folder() == ScaleCache().folder == tmp_path

    def test_the_users_cache_otherwise(self, monkeypatch, tmp_path):
        monkeypatch.delenv("QVD_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_cache_folder() == tmp_path / "qvd"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert default_cache_folder() == tmp_path / ".cache" / "qvd"
