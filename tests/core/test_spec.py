"""`QuantSpec`: its sets of values and its JSON form."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvd_core import QuantSpec
from qvd_core.spec import _CHOICES

names = st.lists(st.text(min_size=1, max_size=5), max_size=3)
specs = st.builds(
    QuantSpec,
    weight_bits=st.integers(4, 8),
    activation_bits=st.integers(4, 8),
    shift=st.booleans(),
    bias_correction=st.booleans(),
    portable=st.booleans(),
    rotate=st.booleans(),
    buckets=st.integers(1, 32),
    auto_keep=st.none() | st.floats(0, 100, exclude_min=True),
    modules_to_not_convert=names,
    **{field: st.sampled_from(allowed) for field, allowed in _CHOICES.items()},
)


@given(specs)
def test_json_round_trip(spec):
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(
    st.one_of(st.integers().filter(lambda bits: not 4 <= bits <= 8), st.booleans(), st.floats(), st.text(), st.none())
)
def test_bits_outside_the_set(bits):
    for field in ("weight_bits", "activation_bits"):
        with pytest.raises(ValueError, match=field):
            QuantSpec(**{field: bits})


@pytest.mark.parametrize(
    "field", [*_CHOICES, "shift", "rotate", "bias_correction", "portable", "modules_to_not_convert"]
)
@pytest.mark.parametrize("value", ["nonsense", 3, 1.0, ["a", 4], [""], {"a": []}.values()])
def test_values_outside_the_set(field, value):
    with pytest.raises(ValueError, match=field):
        QuantSpec(**{field: value})


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().weight_bits = 4
    assert len({QuantSpec(), QuantSpec(), QuantSpec(shift=False)}) == 2


def test_layer_names_of_any_iterable():
    expected = ("a", "b")
    assert QuantSpec(modules_to_not_convert=["a", "b"]).modules_to_not_convert == expected
    assert QuantSpec(modules_to_not_convert=(name for name in "ab")).modules_to_not_convert == expected
    assert QuantSpec(modules_to_not_convert=None).modules_to_not_convert == ()


def test_unknown_setting_is_named():
    with pytest.raises(ValueError, match="group_size"):
        QuantSpec.from_dict({"group_size": 128})


@given(specs)
def test_transforms_inputs(spec):
    assert spec.transforms_inputs == (spec.shift or spec.scale != "none" or spec.rotate)


@pytest.mark.parametrize("value", [0, 33, -1, True, 8.0, "8", None])
def test_buckets_outside_the_set(value):
    with pytest.raises(ValueError, match="buckets must be an integer from 1 to 32"):
        QuantSpec(buckets=value)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, True, "0.1", float("nan"), float("inf")])
def test_auto_keep_outside_the_set(value):
    with pytest.raises(ValueError, match="auto_keep must be"):
        QuantSpec(auto_keep=value)


@given(specs)
def test_what_follows_from_a_spec(spec):
    assert spec.is_static == (spec.activation in ("static", "static_bucket", "static_frame"))
    below_eight = {"gptq": True, "nearest": False, "auto": spec.weight_bits < 8}
    assert spec.compensates_rounding == below_eight[spec.rounding]
