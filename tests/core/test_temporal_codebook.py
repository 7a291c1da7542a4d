"""The codebooks as a specification: against the formulas of METHOD section 2, value by value in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.temporal import (
    TemporalQuantizer,
    channel_quantizer,
    log2_quantizer,
    logk_quantizer,
    mix_quantizer,
    power_quantizer,
    uniform_quantizer,
)
from tests.core.temporal_cases import AMPLITUDE, BUILDERS, FEATURES, HIGHEST, LOWEST, NAN

ALL_BITS = (2, 3, 4, 6, 8)
every_quantizer = pytest.mark.parametrize("bits", ALL_BITS)
every_builder = pytest.mark.parametrize("name", BUILDERS)


# The formulas, value by value --------------------------------------------------------------------------------------


def sign_of(x: float) -> float:
    return math.copysign(1.0, x) if x != 0.0 else 1.0


def log2_formula(x: float, amplitude: float, magnitudes: int) -> float:
    """Without a zero level: zero takes the smallest positive magnitude."""
    code = magnitudes - 1 if x == 0.0 else min(max(round(-math.log2(abs(x) / amplitude)), 0), magnitudes - 1)
    return sign_of(x) * math.ldexp(amplitude, -code)


def logk_formula(x: float, amplitude: float, k: float, bits: int) -> float:
    if x == 0.0:
        return 0.0
    code = min(max(round(-k * math.log2(abs(x) / amplitude)), 0), 2 ** (bits - 1) - 2)
    return sign_of(x) * amplitude * math.exp2(-code / k)


def power_formula(x: float, amplitude: float, p: float, bits: int) -> float:
    largest = 2 ** (bits - 1) - 1
    code = min(max(round(largest * (abs(x) / amplitude) ** (1 / p)), 0), largest)
    return sign_of(x) * amplitude * math.pow(code / largest, p)


def uniform_formula(x: float, lowest: float, highest: float, levels: int) -> float:
    step = (highest - lowest) / (levels - 1)
    return lowest + step * min(max(round((x - lowest) / step), 0), levels - 1)


def mix_formula(x: float, edge: float, bits: int) -> float:
    if x >= edge:
        return uniform_formula(x, edge, HIGHEST, 2 ** (bits - 1))
    return log2_formula(x, edge if x >= 0 else -LOWEST, 2 ** (bits - 2))


def assert_follows(quantizer: TemporalQuantizer, formula: Callable[[float], float], smallest: float = 0.0) -> None:
    """The codebook equals the formula on features, a dense sweep past both ends, powers of two and zero."""
    octaves = AMPLITUDE * 2.0 ** torch.linspace(-20, 1, 200)
    sweep = torch.linspace(-2 * AMPLITUDE, 2 * AMPLITUDE, 801)
    x = torch.cat([FEATURES[:5].flatten(), sweep, octaves, -octaves, torch.zeros(1)])
    # On a tie the formula rounds half to even and the codebook toward zero: values that close to one prove nothing.
    clear = torch.tensor([formula(value * (1 - 1e-6)) == formula(value * (1 + 1e-6)) for value in x.tolist()])
    assert clear.float().mean() > 0.98
    x = x[clear]
    expected = torch.tensor([formula(value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(quantizer(x).double(), expected, rtol=1e-6, atol=smallest)


@pytest.mark.parametrize("bits", ALL_BITS)
class TestFormulas:
    def test_log2(self, bits: int) -> None:
        assert_follows(log2_quantizer(FEATURES, bits), lambda x: log2_formula(x, AMPLITUDE, 2 ** (bits - 1)), 1e-37)

    @pytest.mark.parametrize("k", [1.0, 2.5, 8.0, 32.0])
    def test_logk(self, bits: int, k: float) -> None:
        assert_follows(logk_quantizer(AMPLITUDE, k, bits), lambda x: logk_formula(x, AMPLITUDE, k, bits), 1e-37)

    @pytest.mark.parametrize("p", [1.0, 2.3, 4.0])
    def test_power(self, bits: int, p: float) -> None:
        assert_follows(power_quantizer(AMPLITUDE, p, bits), lambda x: power_formula(x, AMPLITUDE, p, bits))

    @pytest.mark.parametrize("edge", [0.0, 0.1, 0.7 * HIGHEST])
    def test_mix(self, bits: int, edge: float) -> None:
        assert_follows(mix_quantizer(FEATURES, edge, bits), lambda x: mix_formula(x, edge, bits), 1e-15)

    def test_uniform(self, bits: int) -> None:
        assert_follows(uniform_quantizer(FEATURES, bits), lambda x: uniform_formula(x, LOWEST, HIGHEST, 2**bits), 1e-6)

    def test_channel(self, bits: int) -> None:
        expected = [
            [uniform_formula(x, min(column), max(column), 2**bits) for x in column] for column in FEATURES.T.tolist()
        ]
        torch.testing.assert_close(channel_quantizer(FEATURES, bits)(FEATURES), torch.tensor(expected).T)


def test_logk_zero_share_sends_small_values_to_zero() -> None:
    quantizer = logk_quantizer(1.0, 1.0, 4, zero_share=0.5)  # magnitudes 1 ... 2^-6
    x = torch.tensor([2.0**-7, 2.0**-7 * 1.01, -(2.0**-7), -(2.0**-7) * 1.01])
    assert quantizer(x).tolist() == [0.0, 2.0**-6, 0.0, -(2.0**-6)]


@pytest.mark.parametrize(
    ("name", "zero"),
    [("logk", 0.0), ("logk, half zero", 0.0), ("power", 0.0), ("mix, edge 0", 0.0)],
)
def test_zero_is_a_level(name: str, zero: float) -> None:
    assert BUILDERS[name](4)(torch.tensor([0.0, -0.0])).tolist() == [zero, zero]


@pytest.mark.parametrize(("name", "amplitude"), [("log2", AMPLITUDE / 2**7), ("mix", 0.3 / 2**3)])
def test_zero_without_a_level_counts_as_positive(name: str, amplitude: float) -> None:
    assert BUILDERS[name](4)(torch.tensor([0.0, -0.0])).tolist() == pytest.approx([amplitude, amplitude])


# Properties of every quantizer -------------------------------------------------------------------------------------


def values(quantizer: TemporalQuantizer, numbers: list[float]) -> Tensor:
    """The numbers as rows [len, C] (or [len, 1]), the same in every channel."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, len(quantizer.offset))


finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)  # those count as zero
near = st.floats(-5, 5, width=32, allow_subnormal=False)
numbers = st.lists(st.one_of(finite, near), min_size=1, max_size=20)


@every_builder
class TestProperties:
    @given(numbers=numbers, bits=st.integers(2, 8))
    @settings(max_examples=15)
    def test_idempotent_monotone_saturating(self, name: str, numbers: list[float], bits: int) -> None:
        quantizer = BUILDERS[name](bits)
        x = values(quantizer, sorted(numbers))
        codes, rounded = quantizer.encode(x), quantizer(x)
        assert torch.equal(quantizer(rounded), rounded)
        assert (codes[1:] >= codes[:-1]).all() and (rounded[1:] >= rounded[:-1]).all()
        assert codes.dtype == torch.uint8 and int(codes.max()) < len(quantizer.levels) <= 2**bits
        ends = quantizer.decode(torch.tensor([[0], [len(quantizer.levels) - 1]]).expand(-1, x.shape[1]))
        assert (rounded >= ends[0]).all() and (rounded <= ends[1]).all()

    @every_quantizer
    def test_every_level_is_its_own_code(self, name: str, bits: int) -> None:
        quantizer = BUILDERS[name](bits)
        codes = torch.arange(len(quantizer.levels), dtype=torch.uint8)[:, None].expand(-1, len(quantizer.offset))
        assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)

    @every_quantizer
    def test_survives_a_safetensors_file(self, name: str, bits: int) -> None:
        quantizer = BUILDERS[name](bits)
        tensors = load(save(quantizer.to_tensors()))
        again = TemporalQuantizer.from_tensors(quantizer.name, bits, tensors)
        assert torch.equal(again.encode(FEATURES), quantizer.encode(FEATURES))
        assert torch.equal(again(FEATURES), quantizer(FEATURES))

    def test_half_precision_input(self, name: str) -> None:
        quantizer = BUILDERS[name](8)
        x = FEATURES.bfloat16()
        assert quantizer(x).dtype == torch.float32
        assert torch.equal(quantizer(x), quantizer(x.float()))


@pytest.mark.parametrize("name", ["log2", "logk", "logk, half zero", "power"])
@given(numbers=numbers, bits=st.integers(2, 8))
@settings(max_examples=25)
def test_sign_magnitude_quantizers_are_odd(name: str, numbers: list[float], bits: int) -> None:
    quantizer = BUILDERS[name](bits)
    x = torch.tensor([number for number in numbers if number != 0.0] or [1.0])
    # The boundaries themselves are ties: there, too.
    x = torch.cat([x, quantizer.boundaries[quantizer.boundaries.abs() > 1e-37], quantizer.levels])
    x = x[x != 0]
    assert torch.equal(quantizer(-x), -quantizer(x))


@given(k=st.sampled_from([1.0, 1.5, 4.0, 7.5, 32.0]), bits=st.integers(2, 8), share=st.floats(0, 1))
def test_logk_relative_error_bound(k: float, bits: int, share: float) -> None:
    """|x̂/x - 1| <= 2^(1/(2k)) - 1 everywhere inside the range."""
    octaves = min((2 ** (bits - 1) - 2) / k, 100.0)
    x = torch.tensor([3.7 * 2.0 ** (-share * octaves)])
    error = (logk_quantizer(3.7, k, bits)(x) / x - 1).abs().item()
    assert error <= 2 ** (1 / (2 * k)) - 1 + 1e-6


@given(share=st.floats(0, 1), bits=st.integers(2, 8))
def test_uniform_error_bound(share: float, bits: int) -> None:
    x = torch.tensor([LOWEST + share * (HIGHEST - LOWEST)])
    error = (uniform_quantizer(FEATURES, bits)(x) - x).abs().item()
    assert error <= (HIGHEST - LOWEST) / (2**bits - 1) / 2 + 1e-6


@given(share=st.floats(0, 1), p=st.sampled_from([1.0, 1.7, 4.0]), bits=st.integers(2, 8))
def test_power_error_bound(share: float, p: float, bits: int) -> None:
    """At most half a step in the p-th root, where the quantizer is uniform."""
    x = torch.tensor([2.0 * share])
    error = ((power_quantizer(2.0, p, bits)(x) / 2).pow(1 / p) - (x / 2).pow(1 / p)).abs().item()
    assert error <= 0.5 / (2 ** (bits - 1) - 1) + 1e-5


def test_power_of_one_is_the_symmetric_uniform_quantizer() -> None:
    levels = power_quantizer(7.0, 1.0, 4).levels
    torch.testing.assert_close(levels, torch.arange(-7.0, 8.0))


@pytest.mark.parametrize("amplitude", [1e-37, 1e-30, 1e30, 3e38])
def test_extreme_amplitudes_keep_a_valid_codebook(amplitude: float) -> None:
    features = torch.tensor([[-0.5, 1.0, 0.25]]) * amplitude
    made = [logk_quantizer(amplitude, 1.0, 8), power_quantizer(amplitude, 4.0, 8), log2_quantizer(features, 8)]
    made += [
        mix_quantizer(features, 0.5 * amplitude, 8),
        uniform_quantizer(features, 8),
        channel_quantizer(features, 8),
    ]
    for quantizer in made:
        TemporalQuantizer.from_tensors(quantizer.name, 8, quantizer.to_tensors())
        assert torch.isfinite(quantizer(features)).all()
        assert torch.equal(quantizer(quantizer(features)), quantizer(features))


def test_a_constant_channel_decodes_to_its_value() -> None:
    features = torch.tensor([[1.25, 0.0], [1.25, 1.0]])
    quantizer = channel_quantizer(features, 4)
    assert torch.equal(quantizer(features), features)
    assert quantizer(torch.tensor([[-9.0, 0.0], [9.0, 9.0]])).tolist() == [[1.25, 0.0], [1.25, 1.0]]


# The stored form ---------------------------------------------------------------------------------------------------


def test_to_tensors_gives_copies() -> None:
    """Several layers may share one quantizer; safetensors refuses tensors that share memory."""
    quantizer = BUILDERS["power"](4)
    quantizer.to_tensors()["levels"].zero_()
    assert quantizer.levels.abs().max() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", torch.tensor([0.0, 2.0, 1.0])),
        ("levels", torch.tensor([0.0, 1.0, 1.0])),
        ("levels", torch.tensor([0.0, NAN, 2.0])),
        ("levels", torch.arange(3)),
        ("levels", torch.zeros(1, 3)),
        ("levels", torch.empty(0)),
        ("levels", torch.arange(17.0)),
        ("boundaries", torch.tensor([0.5])),
        ("boundaries", torch.tensor([1.5, 0.5])),
        ("boundaries", torch.tensor([0.5, math.inf])),
        ("boundaries", torch.tensor([0.5, 2.0])),
        ("offset", torch.zeros(2)),
        ("offset", torch.empty(0)),
        ("gain", torch.ones(2)),
        ("gain", torch.zeros(1)),
        ("gain", torch.tensor([-1.0])),
    ],
)
def test_from_tensors_names_the_bad_field(field: str, value: Tensor) -> None:
    tensors = {
        "levels": torch.tensor([0.0, 1.0, 2.0]),
        "boundaries": torch.tensor([0.5, 1.5]),
        "offset": torch.zeros(1),
        "gain": torch.ones(1),
    }
    TemporalQuantizer.from_tensors("power", 4, tensors)
    with pytest.raises(ValueError, match=f"^{field}: .*\\.$"):
        TemporalQuantizer.from_tensors("power", 4, {**tensors, field: value})


def test_from_tensors_checks_name_bits_and_keys() -> None:
    tensors = BUILDERS["power"](4).to_tensors()
    with pytest.raises(ValueError, match=r"^name: .*'cubic'.*power"):
        TemporalQuantizer.from_tensors("cubic", 4, tensors)
    with pytest.raises(ValueError, match=r"^bits: 9"):
        TemporalQuantizer.from_tensors("power", 9, tensors)
    del tensors["gain"]
    with pytest.raises(ValueError, match="gain"):
        TemporalQuantizer.from_tensors("power", 4, tensors)


class TestBadParameters:
    @pytest.mark.parametrize("value", [0.0, -1.0, NAN, math.inf, 1e300])
    def test_parameters(self, value: float) -> None:
        for build, parameter in ((logk_quantizer, "k"), (power_quantizer, "p")):
            with pytest.raises(QVDError, match=r"^amplitude: .*positive"):
                build(value, 2.0, 8)
            with pytest.raises(QVDError, match=rf"^{parameter}: .*positive"):
                build(1.0, value, 8)

    @pytest.mark.parametrize("edge", [-0.1, 1e3, NAN])
    def test_mix_edge(self, edge: float) -> None:
        with pytest.raises(QVDError, match=r"^edge: "):
            mix_quantizer(FEATURES, edge, 8)

    @pytest.mark.parametrize("share", [-0.1, 1.1, NAN])
    def test_zero_share(self, share: float) -> None:
        with pytest.raises(QVDError, match=r"^zero_share: "):
            logk_quantizer(1.0, 2.0, 8, zero_share=share)


def test_a_quantizer_cannot_be_changed() -> None:
    quantizer = BUILDERS["power"](4)
    with pytest.raises(AttributeError):
        quantizer.bits = 5  # type: ignore[misc]
    assert replace(quantizer, bits=5).bits == 5
