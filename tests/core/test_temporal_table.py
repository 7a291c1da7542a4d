"""The table of temporal projections: always what the online path computes, bounded, filled ahead, without weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qvd_core import QuantSpec, load_checkpoint, quantize_model, save_checkpoint
from qvd_core.errors import QVDError
from qvd_core.temporal_layer import MAX_SINGLE_ROWS, TABLE_ROWS, TemporalLinear
from qvd_core.temporal_table import offload_projections, precompute_tables
from tests.core.temporal_cases import layer_features, one_by_one, temporal_layer

POWER = QuantSpec(temporal_quantizer="power")  # one small search instead of all


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


@pytest.fixture
def projected(monkeypatch):
    """Grows by one for every product with a weight."""
    count, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *operands: count.append(1) or linear(*operands))
    return count


def without_weights(layer: TemporalLinear) -> TemporalLinear:
    """Weights that raise when they are read."""
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    layer.weight_scale = layer.weight_scale.to("meta")
    return layer


class TestTable:
    def test_bit_identical_to_online(self, layer):
        x = layer_features(12)
        expected = one_by_one(layer, x)
        for _ in range(2):  # filling it, then reading it
            assert torch.equal(torch.cat([layer(row[None]) for row in x]), expected)
        assert torch.equal(layer(x), expected)  # several rows at once

    def test_nothing_is_projected_twice(self, layer, projected):
        x = layer_features(4)
        layer(x[[0, 0, 1]])
        layer(x[[1, 0]])
        assert len(projected) == 2
        layer(x)
        assert len(projected) == 4

    def test_what_rounds_to_the_same_codes_is_one_row(self, layer, projected):
        """An embedding computed for another batch size differs in its last bits."""
        x = layer.round(layer_features(1))
        assert torch.equal(layer(x), layer(x * (1 + 1e-6)))
        assert len(projected) == 1 and len(layer.table) == 1

    def test_every_dtype_has_rows_of_its_own(self, layer):
        x = layer_features(2).bfloat16()
        for _ in range(2):
            assert torch.equal(layer(x.float()), one_by_one(layer, x.float()))
            assert torch.equal(layer(x), one_by_one(layer, x))
        assert len(layer.table) == 4

    def test_a_training_schedule_under_two_conditions(self, layer, projected):
        """2000 rows in turn never hit 128: each step still costs its own two products, and memory stays bounded."""
        x = layer_features(2000)
        for start in range(0, 2000, 2):
            layer(x[start : start + 2])
        assert len(projected) == 2000 and len(layer.table) == TABLE_ROWS
        layer(x[-TABLE_ROWS // 2 :])
        assert len(projected) == 2000

    def test_rows_in_use_stay(self, layer, projected):
        """The least recently used leave, not the oldest: the other guidance branch may be one row for all steps."""
        x = layer_features(3 * TABLE_ROWS)
        for row in x[1:]:
            layer(torch.stack([x[0], row]))
        assert len(projected) == 3 * TABLE_ROWS

    def test_new_rows_that_push_out_known_ones_of_the_same_call(self, layer):
        x = layer_features(TABLE_ROWS + MAX_SINGLE_ROWS)
        for row in x[:TABLE_ROWS]:
            layer(row[None])
        oldest_and_new = [0, 1, *range(TABLE_ROWS, TABLE_ROWS + MAX_SINGLE_ROWS - 2)]
        for _ in range(2):
            assert torch.equal(layer(x[oldest_and_new]), one_by_one(layer, x[oldest_and_new]))

    def test_a_change_of_scheduler(self, layer):
        for seed in range(4):
            x = layer_features(50, seed)
            assert torch.equal(layer(x), one_by_one(layer, x))

    def test_rows_with_nan_are_remembered_too(self, layer, projected):
        x = layer_features(1)
        x[0, 3] = torch.nan
        assert layer(x).isnan().all() and layer(x).isnan().all()
        assert len(projected) == 1

    def test_forget(self, layer):
        x = layer_features(3)
        layer(x)
        layer.bias.data += 1.0
        layer.forget()
        assert torch.equal(layer(x), one_by_one(layer, x))

    def test_loading_other_weights_empties_it(self, layer):
        x = layer_features(3)
        before = layer(x)
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        state["weight"] = -state["weight"]
        nn.Sequential(layer).load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
        assert torch.equal(layer(x), one_by_one(layer, x)) and not torch.equal(layer(x), before)

    def test_moving_or_casting_empties_it(self, layer):
        x = layer_features(3)
        layer(x)
        nn.Sequential(layer).to(torch.bfloat16)
        assert len(layer.table) == 0
        assert torch.equal(layer(x), one_by_one(layer, x))

    def test_copies_and_pickles_start_empty(self, layer):
        x = layer_features(3)
        expected = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own bytes
            assert len(other.table) == 0 and torch.equal(other(x), expected)
        assert len(layer.table) == 3

    def test_not_used_where_gradients_or_online_are_asked_for(self, layer):
        x = layer_features(3)
        with torch.enable_grad():
            layer(x)
        other = temporal_layer("online")
        other(x)
        assert len(layer.table) == len(other.table) == 0

    def test_filled_in_inference_mode_and_read_outside(self, layer):
        x = layer_features(3)
        with torch.inference_mode():
            inside = layer(x).clone()
        out = layer(x)
        assert torch.equal(out, inside)
        out += 1  # the caller's own tensor,
        assert torch.equal(layer(x), inside)  # not the table's

    def test_is_not_part_of_the_checkpoint(self, layer):
        keys = set(layer.state_dict())
        layer(layer_features(3))
        assert set(layer.state_dict()) == keys


TIMESTEPS = (900.0, 500.0, 100.0)


def projections(model: nn.Module) -> list[TemporalLinear]:
    return [module for module in model.modules() if isinstance(module, TemporalLinear)]


@pytest.fixture
def quantized(denoiser):
    return quantize_model(denoiser.copy(), POWER)


class TestPrecompute:
    def test_sampling_then_needs_no_projection_weight(self, denoiser, quantized):
        expected = denoiser.sample(copy.deepcopy(quantized))
        added = precompute_tables(quantized, TIMESTEPS)
        assert added == sum(len(layer.table) for layer in projections(quantized))
        assert added >= len(TIMESTEPS) * len(projections(quantized))
        for layer in projections(quantized):
            without_weights(layer)
        assert torch.equal(denoiser.sample(quantized), expected)

    def test_the_second_time_adds_nothing(self, quantized):
        precompute_tables(quantized, TIMESTEPS)
        assert precompute_tables(quantized, TIMESTEPS) == 0
        assert precompute_tables(quantized, []) == 0

    def test_a_long_schedule_makes_the_table_larger(self, wan):
        model = quantize_model(wan.copy(), POWER)
        (layer,) = projections(model)
        precompute_tables(model, range(2 * TABLE_ROWS))
        assert len(layer.table) >= 2 * TABLE_ROWS
        layer.forget()
        assert layer.table.capacity == TABLE_ROWS

    def test_in_half_precision_with_a_float32_embedding(self, wan):
        """Wan keeps its timestep embedder in float32 and casts what it gives."""
        model = quantize_model(wan.copy(), POWER).to(torch.bfloat16)
        model.condition_embedder.time_embedder.float()
        precompute_tables(model, TIMESTEPS)
        (layer,) = projections(model)
        before, seen = len(layer.table), []
        layer.register_forward_hook(lambda _, args, out: seen.append(args[0].dtype))
        latents, text = torch.randn(2, 4, 3, 8, 8).bfloat16(), torch.randn(2, 6, 32).bfloat16()
        for timestep in TIMESTEPS:
            model(latents, torch.full((2,), timestep), text)
        assert seen == [torch.bfloat16] * 3 and len(layer.table) == before

    def test_what_cannot_be_computed_beforehand(self, wan, monkeypatch):
        model = quantize_model(wan.copy(), POWER)
        monkeypatch.setattr("qvd_core.temporal_table.find_family", lambda model: None)
        with pytest.raises(QVDError, match=r"prompt, fps or guidance.*fills itself"):
            precompute_tables(model, TIMESTEPS)

    @pytest.mark.parametrize("timestep", [float("nan"), float("inf")])
    def test_bad_timesteps(self, wan, timestep):
        with pytest.raises(QVDError, match="timesteps hold NaN or infinity"):
            precompute_tables(quantize_model(wan.copy(), POWER), [timestep])

    def test_without_a_table(self, wan):
        for model in (wan.copy(), quantize_model(wan.copy(), QuantSpec(temporal="none"))):
            for function in (lambda model: precompute_tables(model, TIMESTEPS), offload_projections):
                with pytest.raises(QVDError, match=r'has no temporal table: quantize it with temporal="table"'):
                    function(model)


class Elsewhere(torch.Tensor):
    """A tensor that claims to lie on another device: this machine may have only one."""

    sent: list[torch.device]

    @property
    def device(self):
        return torch.device("cuda", 0)

    def to(self, device):
        self.sent.append(device)
        return self.detach().as_subclass(torch.Tensor)


class TestOffload:
    def test_known_rows_never_read_the_weights(self, layer):
        x = layer_features(5)
        expected = layer(x)
        assert torch.equal(without_weights(layer)(x), expected)

    def test_an_unknown_row_has_them_sent_to_its_own_device(self, layer):
        x = layer_features(2)
        expected = one_by_one(layer, x)
        layer._parameters["weight"] = elsewhere = layer.weight.detach().as_subclass(Elsewhere)
        elsewhere.sent = []
        assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
        assert elsewhere.sent == [torch.device("cpu")]  # once, for both new rows

    def test_the_weights_move_and_are_counted_and_the_table_stays(self, layer):
        x = layer_features(2)
        expected = layer(x)
        layer._parameters["weight"] = elsewhere = layer.weight.detach().as_subclass(Elsewhere)
        elsewhere.sent = []
        assert offload_projections(nn.Sequential(layer)) == layer.weight.nbytes + layer.weight_scale.nbytes
        assert elsewhere.sent == [torch.device("cpu")] and type(layer.weight) is nn.Parameter
        assert len(layer.table) == 2 and torch.equal(layer(x), expected)

    def test_where_they_already_are(self, denoiser, quantized):
        expected = denoiser.sample(copy.deepcopy(quantized))
        denoiser.sample(quantized)
        assert offload_projections(quantized, "cpu") == 0
        assert torch.equal(denoiser.sample(quantized), expected)

    def test_survives_save_load_copy_cast(self, wan, tmp_path):
        model = quantize_model(wan.copy(), POWER)
        expected = wan.sample(model)
        offload_projections(model, "cpu")
        again = load_checkpoint(wan.copy(), save_checkpoint(model, tmp_path / "model.safetensors"))
        assert torch.equal(wan.sample(again), expected)
        assert torch.equal(wan.sample(copy.deepcopy(model)), expected)
        assert torch.equal(wan.sample(model.to("cpu")), expected)

    def test_never_to_meta(self, wan):
        model = quantize_model(wan.copy(), POWER)
        with pytest.raises(QVDError, match=r'"meta" holds no data.*choose "cpu"'):
            offload_projections(model, "meta")
        assert not any(layer.weight.is_meta for layer in projections(model))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
    def test_between_two_devices(self, wan, tmp_path):
        model = quantize_model(wan.copy(), POWER).cuda()
        (layer,) = projections(model)
        x = torch.randn(6, layer.in_features, device="cuda")
        expected = layer(x).clone()
        layer.forget()
        layer(x[:3])
        assert offload_projections(model) == layer.weight.nbytes + layer.weight_scale.nbytes
        assert layer.weight.device.type == layer.weight_scale.device.type == "cpu" and layer.levels.is_cuda
        assert torch.equal(layer(x), expected)  # three known, three unknown
        save_checkpoint(model, tmp_path / "model.safetensors")
        assert layer.cuda().weight.is_cuda and torch.equal(layer(x), expected)
