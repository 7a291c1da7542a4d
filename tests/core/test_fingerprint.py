"""Fingerprints: the same model through casts and small edits, and no other."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qvd_core import QuantSpec, quantize_model
from qvd_core.fingerprint import PROBE_SIZE, content_fingerprint, probe_agrees, structure_fingerprint, weight_probe

shapes = st.sampled_from([(64, 64), (3, 5), (1, 1), (320, 320), (100, 7, 3, 3), (64, 1), (65, 129)])


def random_weight(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


class TestStructure:
    def test_independent_of_weights_place_and_type(self, wan):
        expected = structure_fingerprint(wan.model)
        other = wan.copy()
        for parameter in other.parameters():
            parameter.data.zero_()
        assert structure_fingerprint(other) == expected
        assert structure_fingerprint(other.to(torch.bfloat16).to("meta")) == expected
        assert len(expected) == 32

    def test_survives_quantization(self, wan):
        quantized = quantize_model(wan.copy(), QuantSpec(temporal="none"))
        assert structure_fingerprint(quantized) == structure_fingerprint(wan.model)

    def test_tells_models_apart(self, wan, unet):
        class Other(nn.Sequential):
            """Another class of the same layers."""

        models = [
            wan.model,
            unet.model,
            nn.Sequential(nn.Linear(2, 3)),
            Other(nn.Linear(2, 3)),
            nn.Sequential(nn.Linear(3, 2)),
            nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)),
            nn.Sequential(nn.ReLU(), nn.Linear(2, 3)),
            nn.Sequential(nn.Conv2d(2, 3, 1)),
        ]
        assert len({structure_fingerprint(model) for model in models}) == len(models)


class TestProbe:
    @given(shapes, st.integers(0, 99))
    def test_size_type_and_ownership(self, shape, seed):
        weight = random_weight(shape, seed)
        probe = weight_probe(weight.to(torch.bfloat16))
        assert probe.dtype == torch.float32 and len(probe) == min(PROBE_SIZE, weight.numel())
        before = weight_probe(weight)
        probe = weight_probe(weight)
        weight.zero_()
        assert torch.equal(probe, before)

    @settings(max_examples=30)
    @given(shapes, st.integers(0, 9999))
    def test_survives_16_bits_and_small_edits(self, shape, seed):
        weight = random_weight(shape, seed)
        probe = weight_probe(weight)
        assert probe_agrees(probe, weight)
        assert probe_agrees(probe, weight.to(torch.bfloat16)) and probe_agrees(probe, weight.to(torch.float16))
        assert probe_agrees(probe, weight.movedim(0, -1).contiguous().movedim(-1, 0))  # whatever its strides
        edit = random_weight((shape[0], 1), seed + 1) @ random_weight((1, weight[0].numel()), seed + 2)
        edit *= 0.1 * weight.norm() / edit.norm()  # a merged LoRA of rank 1, a tenth of the weight
        assert probe_agrees(probe, weight) and (weight.numel() < 100 or probe_agrees(probe, weight + edit.view(shape)))

    @settings(max_examples=50)
    @given(shapes.filter(lambda shape: shape[0] * shape[1] >= 64), st.integers(0, 9999), st.integers(1, 99))
    def test_tells_other_weights(self, shape, seed, distance):
        probe = weight_probe(random_weight(shape, seed))
        assert not probe_agrees(probe, random_weight(shape, seed + distance))
        assert not probe_agrees(probe, -random_weight(shape, seed))
        assert not probe_agrees(probe, random_weight(shape, seed).roll(1))

    def test_zero_initialised_layers(self):
        zeros = torch.zeros(8, 8)
        assert probe_agrees(weight_probe(zeros), zeros)
        assert not probe_agrees(weight_probe(zeros), torch.ones(8, 8))
        assert not probe_agrees(weight_probe(torch.ones(8, 8)), zeros)

    def test_other_sizes_and_nan(self):
        assert not probe_agrees(weight_probe(torch.ones(3, 3)), torch.ones(4, 4))
        assert not probe_agrees(weight_probe(torch.ones(3, 3)), torch.full((3, 3), torch.nan))


class TestContent:
    def test_same_for_a_copy(self, wan):
        assert content_fingerprint(wan.copy()) == content_fingerprint(wan.model)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @pytest.mark.parametrize("element", [0, -1, 1000])
    def test_any_element_of_any_parameter_counts(self, name, element):
        """Also those that the probe skips, through the sum."""
        model = nn.Sequential(nn.Linear(100, 1001))
        other = copy.deepcopy(model)
        getattr(other[0], name).data.view(-1)[element] += 1e-3
        assert content_fingerprint(other) != content_fingerprint(model)

    def test_type_counts(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        model[0].weight.data.fill_(0.5)
        assert content_fingerprint(copy.deepcopy(model).half()) != content_fingerprint(model)

    def test_kept_parameters_count(self, wan):
        other = wan.copy()
        other.patch_embedding.weight.data[0] += 0.01
        assert content_fingerprint(other) != content_fingerprint(wan.model)
        assert structure_fingerprint(other) == structure_fingerprint(wan.model)
