"""q, k and v quantize the input they share once, and never anything else's."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

from qvd_core import load_checkpoint, quantize_model, save_checkpoint, shared_input
from qvd_core.layers import QuantLinear
from qvd_core.ops import dispatch
from qvd_core.shared_input import SharedInput, share_inputs


@pytest.fixture
def counted(monkeypatch):
    """How many inputs the reference backend has quantized."""
    monkeypatch.setenv("QVD_BACKEND", "reference")
    monkeypatch.setattr(shared_input, "SMALL_INPUT", 0)
    calls: list[Tensor] = []
    reference = dispatch.backend("reference")
    original = reference.quantize_rows
    monkeypatch.setattr(reference, "quantize_rows", lambda x, *rest: calls.append(x) or original(x, *rest))
    return calls


@pytest.fixture
def attention(wan):
    """The self-attention projections of one quantized Wan block, and an input for them."""
    attention = quantize_model(wan.copy()).blocks[0].attn1
    return (attention.to_q, attention.to_k, attention.to_v), torch.randn(2, 5, attention.to_q.in_features)


class TestSharing:
    def test_one_quantization_for_three_layers(self, attention, counted):
        layers, x = attention
        with torch.no_grad():
            outputs = [layer(x) for layer in layers]
            assert len(counted) == 1
            for layer, out in zip(layers, outputs, strict=True):
                layer.shared_input = None
                assert torch.equal(layer(x), out)

    def test_codes_go_with_the_last_reader(self, attention, counted):
        layers, x = attention
        with torch.no_grad():
            for layer in layers:
                layer(x)
            assert layers[0].shared_input._last is None
            layers[0](x)
        assert len(counted) == 2

    def test_a_changed_input_is_coded_anew(self, attention, counted):
        layers, x = attention
        with torch.no_grad():
            layers[0](x)
            x.mul_(-3.0)
            out = layers[1](x)
            layers[1].shared_input = None
            assert torch.equal(layers[1](x), out)

    def test_small_inputs_are_quantized_again(self, attention, counted, monkeypatch):
        """In less time than asking takes; so they are not kept either."""
        layers, x = attention
        monkeypatch.setattr(shared_input, "SMALL_INPUT", x.numel() + 1)
        with torch.no_grad():
            for layer in layers:
                layer(x)
        assert len(counted) == 3 and layers[0].shared_input._last is None

    def test_an_equal_tensor_is_another_input(self, attention, counted):
        layers, x = attention
        with torch.no_grad():
            layers[0](x)
            layers[1](x.clone())
        assert len(counted) == 2

    def test_inference_tensors_are_not_remembered(self, attention, counted):
        """They do not count their changes."""
        layers, _ = attention
        with torch.inference_mode():
            x = torch.randn(2, 5, layers[0].in_features)
            for layer in layers:
                layer(x)
        assert len(counted) == 3

    def test_forgets_when_the_input_dies(self):
        shared = SharedInput(2)
        x, coded = torch.randn(2), (torch.randn(2), torch.randn(2))
        shared.quantize(x, "reference", lambda: coded)
        assert shared._last is not None
        del x
        gc.collect()
        assert shared._last is None


class TestWhoShares:
    def groups(self, model):
        found: dict[SharedInput, list[str]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and layer.shared_input is not None:
                found.setdefault(layer.shared_input, []).append(name)
        return sorted(found.values())

    def test_the_readers_of_one_input(self, wan):
        model = quantize_model(wan.copy())
        expected = [[f"blocks.{i}.attn1.to_{part}" for part in "qkv"] for i in range(len(model.blocks))]
        expected += [[f"blocks.{i}.attn2.to_{part}" for part in "kv"] for i in range(len(model.blocks))]
        assert self.groups(model) == sorted(expected)

    def test_not_with_another_shift(self, wan, wan_scales):
        model = wan.copy()
        model = quantize_model(model, scales=wan_scales)
        before = self.groups(model)
        layer = model.blocks[0].attn1.to_k
        assert layer.input_shift is not None
        layer.input_shift = layer.input_shift + 1
        share_inputs(model)
        assert ["blocks.0.attn1.to_q", "blocks.0.attn1.to_v"] in self.groups(model)
        assert len(self.groups(model)) == len(before)

    def test_after_loading(self, wan, tmp_path):
        model = quantize_model(wan.copy())
        save_checkpoint(model, tmp_path / "model.safetensors")
        loaded = load_checkpoint(wan.copy(), tmp_path / "model.safetensors")
        assert self.groups(loaded) == self.groups(model) != []
        loaded.load_state_dict(model.state_dict())
        assert self.groups(loaded) == []

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
    def test_copies_share_among_themselves(self, attention, counted, duplicate):
        layers, x = attention
        with torch.no_grad():
            layers[0](x)
            copies = duplicate(layers)
        assert copies[0].shared_input is copies[2].shared_input is not layers[0].shared_input
        assert copies[0].shared_input._last is None and layers[0].shared_input._last is not None

    def test_whole_model_is_unchanged(self, wan, counted):
        model = quantize_model(wan.copy())
        shared = wan.forward(model, 500.0)
        once = len(counted)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.shared_input = None
        counted.clear()
        assert torch.equal(wan.forward(model, 500.0), shared)
        assert len(counted) == once + 3 * len(model.blocks)
