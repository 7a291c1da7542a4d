"""`TemporalLinear`: the online path against float64, and a table that is always identical to it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec
from qvd_core.convert import encode_layer, fill_layer
from qvd_core.plan import LayerPlan
from qvd_core.temporal import (
    QUANTIZER_NAMES,
    TemporalQuantizer,
    channel_quantizer,
    log2_quantizer,
    logk_quantizer,
    mix_quantizer,
    power_quantizer,
    uniform_quantizer,
)
from qvd_core.temporal_layer import MAX_DISTINCT_LOOKUPS, TABLE_ROWS, TemporalLinear, codebook_tensors

CHANNELS, OUTPUTS = 24, 10


def features(steps: int, seed: int = 0) -> Tensor:
    """Skewed, as SiLU(temb) is."""
    return nn.functional.silu(torch.randn(steps, CHANNELS, generator=torch.Generator().manual_seed(seed)) * 2)


def build(quantizer: str, bits: int) -> TemporalQuantizer:
    """One quantizer of each kind over `features(20)`, without a search."""
    x = features(20)
    return {
        "uniform": lambda: uniform_quantizer(x, bits),
        "channel": lambda: channel_quantizer(x, bits),
        "log2": lambda: log2_quantizer(x, bits),
        "power": lambda: power_quantizer(float(x.max()), 1.7, bits),
        "logk": lambda: logk_quantizer(float(x.max()), 2**bits / 16, bits),
        "mix": lambda: mix_quantizer(x, 0.3, bits),
    }[quantizer]()


def temporal_layer(
    temporal: str = "table", quantizer: str = "power", bits: int = 8, fitted: bool = True
) -> TemporalLinear:
    torch.manual_seed(0)
    source = nn.Linear(CHANNELS, OUTPUTS)
    spec = QuantSpec(temporal=temporal, activation_bits=bits)
    plan = LayerPlan("temporal", ("bias", "codebook") if fitted else ("bias",))
    layer = TemporalLinear(source, plan, spec, torch.float32)
    fill_layer(layer, encode_layer("layer", plan, source.weight, source.bias, spec))
    if fitted:
        fill_layer(layer, codebook_tensors(build(quantizer, bits), CHANNELS))
    return layer.eval()


@pytest.fixture(scope="module")
def built() -> TemporalLinear:
    return temporal_layer()


@pytest.fixture
def layer(built: TemporalLinear) -> TemporalLinear:
    return copy.deepcopy(built)


def online(layer: TemporalLinear, rows: Tensor) -> Tensor:
    """Row by row through the online path of a layer that has no table."""
    twin = copy.deepcopy(layer)
    twin.spec = replace(layer.spec, temporal="online")
    return torch.cat([twin(row[None]) for row in rows.reshape(-1, CHANNELS)]).view(*rows.shape[:-1], OUTPUTS)


@pytest.fixture(autouse=True)
def sampling():
    with torch.no_grad():
        yield


class TestOnline:
    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    def test_against_float64(self, quantizer):
        layer = temporal_layer("online", quantizer)
        x = features(20)
        tensors = {key: getattr(layer, key) for key in ("levels", "boundaries", "offset", "gain")}
        codes = (((x - tensors["offset"]) / tensors["gain"])[..., None] > tensors["boundaries"]).sum(dim=-1)
        decoded = tensors["levels"].double()[codes] * tensors["gain"].double() + tensors["offset"].double()
        weight = layer.weight.double() * layer.weight_scale.double()
        torch.testing.assert_close(layer(x).double(), decoded @ weight.T + layer.bias.double(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    @pytest.mark.parametrize("bits", [4, 8])
    def test_codebook_tensors_decode_like_the_quantizer(self, quantizer, bits):
        """Unused tails of levels and boundaries change nothing, also far outside the range."""
        x = features(20)
        fitted = build(quantizer, bits)
        tensors = codebook_tensors(fitted, CHANNELS)
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
            "levels": (2**bits,),
            "boundaries": (2**bits - 1,),
            "offset": (CHANNELS,),
            "gain": (CHANNELS,),
        }
        layer = temporal_layer("online", bits=bits)
        fill_layer(layer, tensors)
        fill_layer(layer, {"weight_scale": torch.ones(OUTPUTS, 1), "bias": torch.zeros(OUTPUTS)})
        layer.weight.data.copy_(torch.eye(OUTPUTS, CHANNELS))
        x = torch.cat([x, x * 1e6, torch.full((1, CHANNELS), torch.inf), torch.zeros(1, CHANNELS)])
        assert torch.equal(layer(x), fitted(x)[:, :OUTPUTS])

    def test_without_codebook_features_are_not_rounded(self):
        layer, x = temporal_layer("online", fitted=False), features(5)
        expected = x.double() @ layer.dequantized_weight().double().T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("temporal", ["table", "online"])
    @pytest.mark.parametrize("fitted", [True, False])
    def test_nan_reaches_the_output(self, temporal, fitted):
        layer, x = temporal_layer(temporal, fitted=fitted), features(3)
        x[1, 4] = torch.nan
        out = layer(x)
        assert out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2]], online(layer, x[[0, 2]]))
        assert torch.equal(layer(x).isnan(), out.isnan())

    def test_full_precision_under_autocast(self, layer):
        x = features(3)
        expected = online(layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_input_types(self, layer, dtype):
        x = features(3).to(dtype)
        out = layer(input=x)
        assert out.dtype == dtype and torch.equal(out, online(layer, x.float()).to(dtype))


class TestTable:
    def test_bit_identical_to_online(self, layer):
        x = features(12)
        expected = online(layer, x)
        for _ in range(2):  # filling it, then reading it
            assert torch.equal(torch.cat([layer(row[None]) for row in x]), expected)
        assert torch.equal(layer(x), expected)  # several rows at once

    def test_rows_do_not_depend_on_what_came_with_them(self, layer):
        x = features(12)
        expected = online(layer, x)
        together = layer(x)
        layer.forget()
        assert torch.equal(layer(x[[3, 3, 5]]), expected[[3, 3, 5]])
        assert torch.equal(layer(x[[5, 1, 3]]), expected[[5, 1, 3]])
        assert torch.equal(together, expected)

    def test_nothing_is_projected_twice(self, layer, monkeypatch):
        projected = []
        project = layer.project
        monkeypatch.setattr(layer, "project", lambda rows: projected.append(len(rows)) or project(rows))
        x = features(4)
        layer(x[[0, 0, 1]])
        layer(x[[1, 0]])
        assert sum(projected) == 2
        layer(x)
        assert sum(projected) == 4

    @pytest.mark.parametrize("shape", [(CHANNELS,), (2, CHANNELS), (2, 3, CHANNELS), (0, CHANNELS)])
    def test_shapes(self, layer, shape):
        x = features(6).flatten()[: torch.Size(shape).numel()].view(shape)
        assert torch.equal(layer(x), online(layer, x) if x.numel() else torch.empty(0, OUTPUTS))

    def test_more_timesteps_than_it_holds(self, layer):
        x = features(2 * TABLE_ROWS + 7)
        expected = online(layer, x)
        for _ in range(2):
            for start in range(0, len(x), 5):
                assert torch.equal(layer(x[start : start + 5]), expected[start : start + 5])
        assert len(layer._table[0]) <= TABLE_ROWS

    def test_new_rows_that_push_out_known_ones_of_the_same_call(self, layer):
        x = features(TABLE_ROWS + MAX_DISTINCT_LOOKUPS)
        expected = online(layer, x)
        for row in x[:TABLE_ROWS]:
            layer(row[None])
        oldest_and_new = [0, 1, *range(TABLE_ROWS, TABLE_ROWS + MAX_DISTINCT_LOOKUPS - 2)]
        assert torch.equal(layer(x[oldest_and_new]), expected[oldest_and_new])
        assert torch.equal(layer(x[oldest_and_new]), expected[oldest_and_new])

    def test_per_token_timesteps_go_past_it(self, layer):
        x = features(MAX_DISTINCT_LOOKUPS + 1)
        torch.testing.assert_close(layer(x), online(layer, x))
        assert layer._table is None

    def test_a_change_of_scheduler(self, layer):
        for seed in range(4):
            x = features(50, seed)
            assert torch.equal(layer(x), online(layer, x))

    def test_forget(self, layer):
        x = features(3)
        layer(x)
        layer.bias.data += 1.0
        layer.forget()
        assert torch.equal(layer(x), online(layer, x))

    def test_loading_other_weights_empties_it(self, layer):
        x = features(3)
        before = layer(x)
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        state["weight"] = -state["weight"]
        nn.Sequential(layer).load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
        assert torch.equal(layer(x), online(layer, x)) and not torch.equal(layer(x), before)

    def test_moving_or_casting_empties_it(self, layer):
        x = features(3)
        layer(x)
        nn.Sequential(layer).to(torch.bfloat16)
        assert layer._table is None
        assert torch.equal(layer(x), online(layer, x))

    def test_not_used_where_gradients_or_online_are_asked_for(self, layer):
        x = features(3)
        with torch.enable_grad():
            layer(x)
        assert layer._table is None
        other = temporal_layer("online")
        other(x)
        assert other._table is None

    def test_filled_in_inference_mode_and_read_outside(self, layer):
        x = features(3)
        with torch.inference_mode():
            inside = layer(x).clone()
        out = layer(x)
        assert torch.equal(out, inside)
        out += 1  # the caller's own tensor,
        assert torch.equal(layer(x), inside)  # not the table's

    def test_is_not_part_of_the_checkpoint(self, layer):
        keys = set(layer.state_dict())
        layer(features(3))
        assert set(layer.state_dict()) == keys
