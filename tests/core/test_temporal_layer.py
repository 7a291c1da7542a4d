"""`TemporalLinear` without its table: against float64, for every shape, type and kind of call."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvd_core.convert import fill_layer
from qvd_core.temporal import QUANTIZER_NAMES, channel_quantizer
from qvd_core.temporal_layer import MAX_SINGLE_ROWS, TemporalLinear, codebook_tensors
from tests.core.temporal_cases import CHANNELS, OUTPUTS, layer_features, layer_quantizer, one_by_one, temporal_layer


@pytest.fixture(scope="module")
def built() -> TemporalLinear:
    return temporal_layer()


@pytest.fixture
def layer(built: TemporalLinear) -> TemporalLinear:
    return copy.deepcopy(built)


@pytest.fixture(autouse=True)
def sampling():
    with torch.no_grad():
        yield


class TestOnline:
    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    def test_against_float64(self, quantizer):
        layer = temporal_layer("online", quantizer)
        x = layer_features(20)
        tensors = {key: getattr(layer, key) for key in ("levels", "boundaries", "offset", "gain")}
        codes = (((x - tensors["offset"]) / tensors["gain"])[..., None] > tensors["boundaries"]).sum(dim=-1)
        decoded = tensors["levels"].double()[codes] * tensors["gain"].double() + tensors["offset"].double()
        weight = layer.weight.double() * layer.weight_scale.double()
        torch.testing.assert_close(layer(x).double(), decoded @ weight.T + layer.bias.double(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    @pytest.mark.parametrize("bits", [4, 8])
    def test_codebook_tensors_decode_like_the_quantizer(self, quantizer, bits):
        """Unused tails of levels and boundaries change nothing, also far outside the range."""
        x = layer_features(20)
        fitted = layer_quantizer(quantizer, bits)
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
        layer, x = temporal_layer("online", fitted=False), layer_features(5)
        expected = x.double() @ layer.dequantized_weight().double().T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("temporal", ["table", "online"])
    @pytest.mark.parametrize("fitted", [True, False])
    def test_nan_reaches_the_output(self, temporal, fitted):
        layer, x = temporal_layer(temporal, fitted=fitted), layer_features(3)
        x[1, 4] = torch.nan
        out = layer(x)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], one_by_one(layer, x[[0, 2]]))
        assert torch.equal(layer(x).isnan(), out.isnan())

    def test_full_precision_under_autocast(self, layer):
        x = layer_features(3)
        expected = one_by_one(layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_input_types(self, layer, dtype):
        x = layer_features(3).to(dtype)
        out = layer(input=x)
        assert out.dtype == dtype and torch.equal(out, one_by_one(layer, x.float()).to(dtype))

    @pytest.mark.parametrize("shape", [(CHANNELS,), (2, CHANNELS), (2, 3, CHANNELS), (0, CHANNELS), (2, 0, CHANNELS)])
    def test_shapes(self, layer, shape):
        x = layer_features(6).flatten()[: torch.Size(shape).numel()].view(shape)
        for mode in ("table", "online"):
            layer.spec = replace(layer.spec, temporal=mode)
            out = layer(x)
            assert out.shape == (*shape[:-1], OUTPUTS)
            assert torch.equal(out, one_by_one(layer, x) if x.numel() else torch.empty(*shape[:-1], OUTPUTS))

    def test_constant_features_and_a_dead_channel(self):
        layer = temporal_layer("table", "channel")
        x = layer_features(20)
        x[:, 3] = 0.0
        fill_layer(layer, codebook_tensors(channel_quantizer(x, 8), CHANNELS))
        layer.forget()
        assert (layer.round(x)[:, 3] == 0).all() and torch.isfinite(layer(x)).all()
        constant = x[:1].repeat(5, 1)
        fill_layer(layer, codebook_tensors(channel_quantizer(constant, 8), CHANNELS))
        layer.forget()
        assert torch.equal(layer.round(constant), constant)
        assert torch.equal(layer(constant), one_by_one(layer, constant))


cached_layer = cache(temporal_layer)
per_token = st.lists(st.integers(0, 11), min_size=1, max_size=6)


class TestDistinctRows:
    @pytest.mark.parametrize("temporal", ["table", "online"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_per_token_timesteps(self, layer, temporal, dtype, monkeypatch):
        """Tokens of a clean first frame and of noisy ones: two distinct rows among many."""
        layer.spec = replace(layer.spec, temporal=temporal)
        tokens = layer_features(2).to(dtype)[[0] * 40 + [1] * 160].view(2, 100, CHANNELS)
        expected = one_by_one(layer, tokens)
        whole = []
        monkeypatch.setattr(layer, "project", lambda rows: whole.append(rows))
        assert torch.equal(layer(tokens), expected) and not whole

    @pytest.mark.parametrize("temporal", ["table", "online"])
    def test_many_distinct_rows_are_one_product_each_once(self, layer, temporal, monkeypatch):
        layer.spec = replace(layer.spec, temporal=temporal)
        x = layer_features(MAX_SINGLE_ROWS + 1)
        sizes, project = [], layer.project
        monkeypatch.setattr(layer, "project", lambda rows: sizes.append(len(rows)) or project(rows))
        tokens = x.repeat(3, 1)
        torch.testing.assert_close(layer(tokens), one_by_one(layer, tokens))
        assert sizes == [MAX_SINGLE_ROWS + 1]

    def test_nearly_all_distinct_is_one_plain_product(self, layer, monkeypatch):
        x = layer_features(300)
        sizes, project = [], layer.project
        monkeypatch.setattr(layer, "project", lambda rows: sizes.append(len(rows)) or project(rows))
        torch.testing.assert_close(layer(x), one_by_one(layer, x))
        assert sizes == [300] and len(layer.table) == 0

    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    @given(
        batches=st.lists(per_token, min_size=1, max_size=4),
        bits=st.sampled_from([4, 6, 8]),
        copies=st.sampled_from([1, 20]),
    )
    @settings(max_examples=20)
    def test_table_and_online_agree_bit_for_bit_in_any_company(self, quantizer, batches, bits, copies):
        table, plain = (cached_layer(mode, quantizer, bits) for mode in ("table", "online"))
        table.forget()
        x = layer_features(12, seed=3) * 1.3  # also outside the fitted range
        for batch in batches:
            rows = x[batch * copies]
            expected = torch.cat([plain(row[None]) for row in rows])
            assert torch.equal(table(rows), expected)
            assert torch.equal(plain(rows), expected)

    def test_not_under_autograd(self, layer):
        """Every row must get its own gradient, equal rows too."""
        x = layer_features(2)[[0, 0, 1]].requires_grad_()
        layer.levels = None
        with torch.enable_grad():
            layer(x).sum().backward()
        assert (x.grad.abs().sum(dim=1) > 0).all() and len(layer.table) == 0

    @pytest.mark.parametrize("temporal", ["table", "online"])
    @pytest.mark.parametrize("rows", [1, 2, 200])
    def test_compiles_in_one_graph(self, temporal, rows):
        layer, x = temporal_layer(temporal), layer_features(rows)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), one_by_one(layer, x))
        assert len(layer.table) == 0
