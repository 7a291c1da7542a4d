"""HTDQ as a specification: the codebooks against the formulas of METHOD section 2, value by value in float64."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from qvd_core import temporal, temporal_metrics
from qvd_core.errors import QVDError
from qvd_core.temporal import (
    AMPLITUDE_SHARES,
    POWERS,
    QUANTIZER_NAMES,
    TemporalFit,
    TemporalQuantizer,
    channel_quantizer,
    collision_rate,
    fit_temporal_quantizer,
    log2_quantizer,
    logk_quantizer,
    mix_quantizer,
    power_quantizer,
    td_correlation,
    td_ratio,
    td_score,
    uniform_quantizer,
)

ALL_BITS = (2, 3, 4, 6, 8)


def silu_features(steps: int = 20, channels: int = 64, seed: int = 0) -> Tensor:
    """Features [T, C] like a timestep MLP's: smooth in time, a dense mass in [-0.28, 0.3], a thin positive tail."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.linspace(999, 1, steps)[:, None]
    angles = timesteps * torch.exp(-math.log(1e4) * torch.arange(32) / 32)
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(sinusoids @ torch.randn(64, channels, generator=generator) / 4)
    spread = torch.exp(0.8 * torch.randn(channels, generator=generator))
    features: Tensor = F.silu(
        hidden @ torch.randn(channels, channels, generator=generator) / channels**0.5 * spread - 0.3
    )
    return features


def projection_weight(rows: int = 128, channels: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) / math.sqrt(channels)


FEATURES = silu_features()
PROJECTION = projection_weight()
LOWEST, HIGHEST = FEATURES.min().item(), FEATURES.max().item()
AMPLITUDE = FEATURES.abs().max().item()

# Every builder at typical parameters, on FEATURES.
BUILDERS: dict[str, Callable[[int], TemporalQuantizer]] = {
    "log2": lambda bits: log2_quantizer(FEATURES, bits),
    "logk": lambda bits: logk_quantizer(AMPLITUDE, 2.5, bits),
    "logk, half zero": lambda bits: logk_quantizer(AMPLITUDE, 2.5, bits, zero_share=0.5),
    "power": lambda bits: power_quantizer(AMPLITUDE, 2.3, bits),
    "mix": lambda bits: mix_quantizer(FEATURES, 0.3, bits),
    "mix, edge 0": lambda bits: mix_quantizer(FEATURES, 0.0, bits),
    "uniform": lambda bits: uniform_quantizer(FEATURES, bits),
    "channel": lambda bits: channel_quantizer(FEATURES, bits),
}
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


finite = st.floats(-1e6, 1e6, width=32)
near = st.floats(-5, 5, width=32)
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


NAN = float("nan")


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


# Metrics -----------------------------------------------------------------------------------------------------------


def distances_by_hand(E: Tensor) -> list[float]:
    rows = E.double().tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[value - m for value, m in zip(row, mean, strict=True)] for row in rows]
    return [
        math.dist(centred[i], centred[j]) / (math.hypot(*centred[i]) + math.hypot(*centred[j]))
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
    ]


class TestMetrics:
    quantized = uniform_quantizer(FEATURES, 4)(FEATURES)

    def test_score_and_ratio_follow_the_formula(self) -> None:
        before, after = distances_by_hand(FEATURES), distances_by_hand(self.quantized)
        assert td_score(FEATURES) == pytest.approx(sum(before) / len(before), rel=1e-12)
        assert td_ratio(FEATURES, self.quantized) == pytest.approx(sum(after) / sum(before), rel=1e-12)

    def test_correlation_follows_the_formula(self) -> None:
        pairs = torch.tensor([distances_by_hand(FEATURES), distances_by_hand(self.quantized)], dtype=torch.float64)
        assert td_correlation(FEATURES, self.quantized) == pytest.approx(torch.corrcoef(pairs)[0, 1].item(), rel=1e-9)

    def test_collisions_follow_the_formula(self) -> None:
        before, after = FEATURES.double().tolist(), self.quantized.tolist()
        threshold = 0.001 * (FEATURES.max() - FEATURES.min()).item()
        count = sum(
            abs(before[i + 1][c] - before[i][c]) > threshold and after[i + 1][c] == after[i][c]
            for i in range(len(before) - 1)
            for c in range(len(before[0]))
        )
        assert count > 0
        assert collision_rate(FEATURES, self.quantized) == pytest.approx(count / ((len(before) - 1) * len(before[0])))

    @given(scale=st.floats(1e-12, 1e12), shift=st.floats(-10, 10))
    @settings(max_examples=30)
    def test_score_does_not_depend_on_scale_and_origin(self, scale: float, shift: float) -> None:
        moved = (FEATURES.double() + shift) * scale
        assert td_score(moved) == pytest.approx(td_score(FEATURES), rel=1e-9)
        assert 0.0 <= td_score(moved) <= 1.0

    def test_identity_reaches_every_goal(self) -> None:
        assert td_ratio(FEATURES, FEATURES) == 1.0
        assert td_correlation(FEATURES, FEATURES) == pytest.approx(1.0)
        assert collision_rate(FEATURES, FEATURES) == 0.0

    @pytest.mark.parametrize("E", [torch.tensor([[1.0, -2.0]]), torch.full((5, 3), 0.1), torch.zeros(4, 2)])
    def test_nothing_to_tell_apart(self, E: Tensor) -> None:
        """One step, or equal rows, have score 0 and cannot be harmed."""
        assert td_score(E) == 0.0
        assert td_ratio(E, E) == 1.0
        assert td_correlation(E, E) == 1.0
        assert collision_rate(E, E) == 0.0

    def test_a_quantizer_that_erases_time(self) -> None:
        erased = torch.zeros_like(FEATURES)
        assert td_ratio(FEATURES, erased) == 0.0
        assert td_correlation(FEATURES, erased) == 0.0
        assert collision_rate(FEATURES, erased) > 0.5

    def test_ratio_without_a_score_of_its_own(self) -> None:
        assert td_ratio(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])) == math.inf

    def test_distances_without_variance(self) -> None:
        """Equidistant rows: Pearson is 0/0, defined as 1 for equal distances and 0 for others."""
        E = torch.eye(3)
        assert td_correlation(E, 2 * E) == 1.0
        assert td_correlation(E, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])) == 0.0

    def test_opposite_directions_are_as_far_as_can_be(self) -> None:
        assert td_score(torch.tensor([[-3.0], [3.0]])) == pytest.approx(1.0)

    @pytest.mark.parametrize("E", [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[NAN]])])
    def test_bad_features(self, E: Tensor) -> None:
        for metric in (
            td_score,
            lambda x: td_ratio(x, x),
            lambda x: td_correlation(x, x),
            lambda x: collision_rate(x, x),
        ):
            with pytest.raises(ValueError, match="temporal features"):
                metric(E)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
            td_ratio(torch.zeros(2, 3), torch.zeros(2, 4))


# Search ------------------------------------------------------------------------------------------------------------


def projected_error(E: Tensor, Eq: Tensor, P: Tensor) -> float:
    """||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||², in full and in float64."""
    E, Eq, P = E.double(), Eq.double(), P.double()
    return float(((Eq - E) @ P.T).square().sum() / ((E - E.mean(dim=0)) @ P.T).square().sum())


def objective(E: Tensor, Eq: Tensor, P: Tensor) -> float:
    return projected_error(E, Eq, P) + 0.1 * (1 - td_correlation(E, Eq)) + 0.1 * collision_rate(E, Eq)


@pytest.fixture
def coarse_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few candidates of every quantizer, for tests that are not about the best one."""
    monkeypatch.setattr(temporal, "LOG_STEPS_PER_OCTAVE", (1.0, 8.0, 32.0))
    monkeypatch.setattr(temporal, "POWERS", (1.0, 2.0, 4.0))
    monkeypatch.setattr(temporal, "EDGE_POINTS", 6)


@cache
def fitted(bits: int, quantizer: str = "auto") -> TemporalFit:
    """The fit to FEATURES under PROJECTION; each is searched once for all tests."""
    return fit_temporal_quantizer(FEATURES, PROJECTION, bits, quantizer)


class TestSearch:
    @pytest.mark.parametrize("rows", [16, 64, 500])
    def test_objective_and_report_are_those_of_the_returned_quantizer(self, rows: int) -> None:
        P = projection_weight(rows)
        fit = fit_temporal_quantizer(FEATURES, P, bits=6, quantizer="power")
        quantized = fit.quantizer(FEATURES)
        assert fit.objective == pytest.approx(objective(FEATURES, quantized, P), rel=1e-3)
        assert fit.report == {
            "td_score": td_score(FEATURES),
            "tdr": td_ratio(FEATURES, quantized),
            "tdc": td_correlation(FEATURES, quantized),
            "col": collision_rate(FEATURES, quantized),
            "projected_error": pytest.approx(projected_error(FEATURES, quantized, P), rel=1e-3),
        }

    def test_auto_is_the_best_of_all(self) -> None:
        each = {name: fitted(4, name) for name in QUANTIZER_NAMES}
        assert {name: fit.quantizer.name for name, fit in each.items()} == {name: name for name in QUANTIZER_NAMES}
        best = fitted(4)
        assert best.objective == min(fit.objective for fit in each.values())

    def test_the_grid_is_searched_exhaustively(self) -> None:
        """Giving candidates up early must not lose the best one."""
        fit = fitted(4, "power")
        every = [
            objective(FEATURES, power_quantizer(share * AMPLITUDE, p, 4)(FEATURES), PROJECTION)
            for share in AMPLITUDE_SHARES
            for p in POWERS
        ]
        assert fit.objective == pytest.approx(min(every), rel=1e-3)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_skewed_features_need_more_than_a_uniform_quantizer(self, bits: int) -> None:
        """The paper's first observation; already one codebook for the whole tensor beats it."""
        uniform = fitted(bits, "uniform").report
        best = fitted(bits).report
        power = fitted(bits, "power").report
        assert best["projected_error"] < 0.2 * uniform["projected_error"]
        assert power["projected_error"] < 0.8 * uniform["projected_error"]
        assert best["col"] < uniform["col"]

    def test_log2_beats_uniform_at_4_bits_only(self) -> None:
        def errors(bits: int) -> list[float]:
            names = ("log2", "uniform")
            return [fitted(bits, name).report["projected_error"] for name in names]

        log2, uniform = errors(4)
        assert log2 < uniform
        log2, uniform = errors(8)
        assert log2 > uniform

    def test_more_bits_are_better(self) -> None:
        objectives = [fitted(bits, "power").objective for bits in (2, 4, 8)]
        assert objectives == sorted(objectives, reverse=True)

    def test_the_projection_matters(self) -> None:
        """Channels that no projection reads do not count."""
        features = torch.cat([FEATURES, 100 * FEATURES[:, :1]], dim=1)
        blind = F.pad(PROJECTION, (0, 1))
        fit = fit_temporal_quantizer(features, blind, 4, "power")
        everything = fit_temporal_quantizer(features, None, 4, "power")
        assert projected_error(features, fit.quantizer(features), blind) <= projected_error(
            features, everything.quantizer(features), blind
        )

    def test_does_not_depend_on_the_features_scale(self) -> None:
        small, plain, large = (fit_temporal_quantizer(FEATURES * 2.0**e, PROJECTION, 4, "power") for e in (-60, 0, 60))
        assert small.objective == pytest.approx(plain.objective, rel=1e-4)
        assert large.objective == pytest.approx(plain.objective, rel=1e-4)

    def test_repeatable(self) -> None:
        features = silu_features(steps=150, channels=8)  # more steps than the search correlates
        first, second = (fit_temporal_quantizer(features, projection_weight(9, 8), 4, "power") for _ in range(2))
        assert first.report == second.report
        assert torch.equal(first.quantizer.levels, second.quantizer.levels)

    def test_a_projection_too_large_for_its_gram_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sketch estimates the error within a few per cent, and chooses as well."""
        P = projection_weight(20_000)
        exact = fit_temporal_quantizer(FEATURES, P, 4, "power")
        monkeypatch.setattr(temporal_metrics, "_GRAM_BUDGET", 10**6)
        monkeypatch.setattr(temporal_metrics, "_CHUNK_ELEMENTS", 10**5)
        sketched = fit_temporal_quantizer(FEATURES, P, 4, "power")
        assert sketched.report["projected_error"] != exact.report["projected_error"]
        assert sketched.report["projected_error"] == pytest.approx(exact.report["projected_error"], rel=0.1)
        assert objective(FEATURES, sketched.quantizer(FEATURES), P) <= 1.02 * exact.objective

    def test_half_precision_and_gradients(self) -> None:
        features, P = (tensor.bfloat16().requires_grad_() for tensor in (FEATURES, PROJECTION))
        fit = fit_temporal_quantizer(features, P, 8, "channel")
        assert fit.quantizer.levels.dtype == torch.float32
        assert not any(tensor.requires_grad for tensor in fit.quantizer.to_tensors().values())

    @pytest.mark.usefixtures("coarse_grids")
    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    def test_inside_a_loading_context(self, quantizer: str) -> None:
        """While a model loads, new tensors may be on "meta" and in half precision."""
        features = FEATURES[:4, :8]
        plain = fit_temporal_quantizer(features, None, 4, quantizer)
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("meta"):
                loading = fit_temporal_quantizer(features, None, 4, quantizer)
        finally:
            torch.set_default_dtype(dtype)
        assert loading.report == plain.report

    def test_is_quick(self) -> None:
        features, P = silu_features(50, 256), projection_weight(2000, 256)
        start = time.process_time()
        fit_temporal_quantizer(features, P)
        assert time.process_time() - start < 10  # takes below one second: a busy machine is no failure


@pytest.mark.usefixtures("coarse_grids")
class TestDegenerateFeatures:
    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    @pytest.mark.parametrize(
        "features",
        [
            pytest.param(torch.tensor([[0.3, -0.1, 4.0]]), id="one step"),
            pytest.param(torch.tensor([0.3, -0.1, 4.0]).repeat(5, 1), id="equal rows"),
            pytest.param(torch.full((4, 3), 0.7), id="one value"),
            pytest.param(torch.full((4, 3), -0.7), id="one negative value"),
            pytest.param(torch.tensor([[-1.0, -2.0], [-3.0, -1.5]]), id="all negative"),
            pytest.param(torch.tensor([[1.0, 2.0], [3.0, 1.5]]), id="all positive"),
        ],
    )
    def test_defined_result(self, features: Tensor, quantizer: str) -> None:
        fit = fit_temporal_quantizer(features, projection_weight(8, features.shape[1]), 4, quantizer)
        assert all(math.isfinite(value) for value in [fit.objective, *fit.report.values()])
        TemporalQuantizer.from_tensors(fit.quantizer.name, 4, fit.quantizer.to_tensors())

    @pytest.mark.parametrize("features", [torch.tensor([[0.3, -0.1, 4.0]]), torch.full((4, 3), 0.7)])
    def test_what_does_not_vary_is_kept_exactly(self, features: Tensor) -> None:
        fit = fit_temporal_quantizer(features, None, 4, "channel")
        assert torch.equal(fit.quantizer(features), features)
        assert fit.objective == 0.0

    def test_a_zero_projection_is_ignored(self) -> None:
        """Zero-initialized modulation: nothing is known about which channels matter."""
        ignored = fit_temporal_quantizer(FEATURES, torch.zeros(8, 64), 4, "power")
        assert ignored.report == fit_temporal_quantizer(FEATURES, None, 4, "power").report


class TestBadInput:
    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (torch.zeros(5), r"shape \(5,\), expected \[T, C\]"),
            (torch.zeros(0, 4), r"shape \(0, 4\)"),
            (torch.zeros(4, 0), r"shape \(4, 0\)"),
            (torch.tensor([[1.0, NAN]]), "NaN"),
            (torch.tensor([[1.0, math.inf]]), "infinity"),
            (torch.zeros(4, 3), "all zero"),
        ],
    )
    def test_features(self, features: Tensor, message: str) -> None:
        with pytest.raises(QVDError, match=rf"^temporal features .*{message}.*\.$"):
            fit_temporal_quantizer(features)
        with pytest.raises(QVDError, match=message):
            uniform_quantizer(features, 8)

    @pytest.mark.parametrize("bits", [1, 9, 0, 8.0, True, "8"])
    def test_bits(self, bits: int) -> None:
        with pytest.raises(QVDError, match=r"^bits: .*choose 2 to 8"):
            fit_temporal_quantizer(FEATURES, bits=bits)
        with pytest.raises(QVDError, match=r"^bits: "):
            power_quantizer(1.0, 2.0, bits)

    def test_quantizer_name(self) -> None:
        with pytest.raises(QVDError, match=r"'log3': choose auto or one of .*logk"):
            fit_temporal_quantizer(FEATURES, quantizer="log3")

    @pytest.mark.parametrize("P", [torch.zeros(8), torch.zeros(8, 63), torch.zeros(0, 64)])
    def test_projection_shape(self, P: Tensor) -> None:
        with pytest.raises(QVDError, match=r"projection has shape .*expected \[N, 64\]: "):
            fit_temporal_quantizer(FEATURES, P)

    @pytest.mark.parametrize("rows", [8, 100])
    @pytest.mark.parametrize("value", [NAN, math.inf])
    def test_projection_values(self, rows: int, value: float) -> None:
        P = projection_weight(rows)
        P[3, 5] = value
        with pytest.raises(QVDError, match="projection holds NaN or infinity: "):
            fit_temporal_quantizer(FEATURES, P)

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
