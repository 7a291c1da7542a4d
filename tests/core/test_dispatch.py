"""Which backend runs: chosen by the device, the rows, the layer's setting or the environment."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qvd_core import QuantSpec, QVDError, quantize_model
from qvd_core.ops import KITCHEN, WEIGHT_ONLY, available_backends, dispatch, int8_linear, resolve_backend

CODES, WEIGHT = torch.ones(1, 2, dtype=torch.int8), torch.ones(1, 2, dtype=torch.int8)


class TestBackendChoice:
    def test_auto(self, monkeypatch):
        monkeypatch.delenv("QVD_BACKEND", raising=False)
        assert resolve_backend() in available_backends("cpu") and resolve_backend("reference") == "reference"

    def test_every_spec_choice_is_known(self):
        from qvd_core.spec import _CHOICES

        assert set(_CHOICES["backend"]) == {"auto", WEIGHT_ONLY, KITCHEN, *dispatch._BACKENDS}

    def test_environment_wins(self, monkeypatch):
        monkeypatch.setenv("QVD_BACKEND", "reference")
        assert resolve_backend("emulated") == resolve_backend() == "reference"

    def test_empty_environment_is_unset(self, monkeypatch):
        monkeypatch.setenv("QVD_BACKEND", "")
        assert resolve_backend("reference") == "reference"

    def test_environment_reaches_the_layers(self, monkeypatch):
        model = quantize_model(nn.Sequential(nn.Linear(64, 64)), QuantSpec(backend="emulated"))
        called = []
        reference = dispatch.backend("reference")
        original = reference.integer_linear
        monkeypatch.setattr(reference, "integer_linear", lambda *a: called.append(1) or original(*a))
        monkeypatch.setenv("QVD_BACKEND", "reference")
        with torch.no_grad():
            model(torch.randn(2, 64))
        assert called

    @pytest.mark.parametrize("module", [nn.Linear(64, 64), nn.Conv2d(64, 64, 3, padding=1), nn.Conv3d(64, 64, 1)])
    def test_weight_only_layers(self, module):
        """No activation is quantized: what remains is the rounding of the weight."""
        torch.manual_seed(0)
        x = torch.randn((3, 64) if isinstance(module, nn.Linear) else (2, 64, *[5] * (module.weight.dim() - 2)))
        layer = quantize_model(nn.Sequential(copy.deepcopy(module)), QuantSpec(backend=WEIGHT_ONLY))[0]
        twin = copy.deepcopy(module)
        twin.weight.data = layer.dequantized_weight()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("capability", "triton", "many", "few"),
        [
            ((9, 0), None, "triton", WEIGHT_ONLY),
            ((12, 0), "triton is not installed", "int_mm", WEIGHT_ONLY),
            ((7, 5), "too old", "int_mm", WEIGHT_ONLY),
            ((7, 0), "too old", "emulated", "emulated"),
            ((10, 3), None, WEIGHT_ONLY, WEIGHT_ONLY),  # next to no int8 units
        ],
    )
    def test_gpus(self, monkeypatch, capability, triton, many, few):
        monkeypatch.delenv("QVD_BACKEND", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(dispatch, "_triton_missing", lambda device: triton)
        caches = (dispatch._automatic, dispatch._remembered_names)
        for cached in caches:
            cached.cache_clear()
        try:
            answers = [resolve_backend("auto", "cuda:0", rows) for rows in (4096, None, 17, 16, 1)]
            assert answers == [many, many, many, few, few]
        finally:
            for cached in caches:
                cached.cache_clear()

    def test_unknown_name(self, monkeypatch):
        monkeypatch.setenv("QVD_BACKEND", "cutlass")
        with pytest.raises(QVDError, match="unknown int8 backend 'cutlass'"):
            int8_linear(CODES, torch.ones(1), WEIGHT, torch.ones(1, 1), None, torch.float32)

    def test_a_backend_of_another_device(self):
        with pytest.raises(QVDError, match="'triton', chosen by the layer's setting, cannot run on cpu"):
            resolve_backend("triton", "cpu")


class TestKitchen:
    def test_absent(self, monkeypatch):
        monkeypatch.setattr(dispatch.kitchen, "installed", lambda: False)
        dispatch._chosen.cache_clear()
        with pytest.raises(QVDError, match="'comfy_kitchen', chosen by the layer's setting, is not installed"):
            resolve_backend(KITCHEN)

    def test_plain_layers_and_others(self, monkeypatch):
        """It runs what it can: other layers keep our operators, and the numbers are the same in float32."""
        kitchen = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
        called = []
        monkeypatch.setattr(kitchen, "int8_linear", lambda *a, f=kitchen.int8_linear: called.append(1) or f(*a))
        torch.manual_seed(0)
        x, source = torch.randn(20, 64), nn.Sequential(nn.Linear(64, 64))
        for bits, uses in ((8, 1), (6, 0)):
            spec = QuantSpec(activation_bits=bits, backend=KITCHEN)
            layer = quantize_model(copy.deepcopy(source), spec)[0]
            with torch.no_grad():
                out = layer(x)
                layer.spec = QuantSpec(activation_bits=bits, backend="reference")
                torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
            assert len(called) == uses
            called.clear()
