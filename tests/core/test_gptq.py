"""Error-compensating rounding from calibration to the quantized model, and the samples of inputs it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qvd_core import QuantSpec, QVDError, Scales, quantize_model
from qvd_core.packing import unpack_int4
from tests.core.conftest import Denoiser

W4A8 = QuantSpec(weight_bits=4, scale="smooth", temporal_quantizer="power")


@pytest.fixture(scope="module")
def scales(wan: Denoiser) -> Scales:
    return wan.calibrate(W4A8)


def fresh_sqnr_db(wan: Denoiser, model: torch.nn.Module) -> float:
    """On latents and texts that calibration has not seen."""
    generator = torch.Generator().manual_seed(77)
    signal = noise = 0.0
    with torch.no_grad():
        for timestep in (950.0, 700.0, 300.0, 50.0):
            arguments = {
                "hidden_states": torch.randn(2, 4, 3, 8, 8, generator=generator),
                "timestep": torch.full((2,), timestep),
                "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
            }
            target = wan.model(**arguments).sample.double()
            signal += float(target.square().sum())
            noise += float((model(**arguments).sample.double() - target).square().sum())
    return float(10 * torch.tensor(signal / noise).log10())


class TestSamples:
    def test_one_per_input_for_rounding_only(self, wan, scales, wan_scales):
        assert not wan_scales.rows and not any(layer.rows_of for layer in wan_scales.layers.values())
        assert {layer.rows_of for layer in scales.layers.values()} == scales.rows.keys()
        assert scales.layers["blocks.0.attn1.to_v"].rows_of == "blocks.0.attn1.to_q"
        for name, rows in scales.rows.items():
            assert rows.dtype == torch.bfloat16 and rows.shape[1] == wan.model.get_submodule(name).in_features

    def test_they_are_inputs_of_the_layer(self, wan, scales):
        name = "blocks.1.ffn.net.2"
        layer, seen = wan.model.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 64)))
        wan.sample()
        handle.remove()
        inputs = torch.cat(seen).bfloat16()
        assert all(bool((inputs == row).all(dim=1).any()) for row in scales.rows[name])

    def test_scales_file_keeps_them(self, wan, scales, tmp_path):
        again = Scales.load(scales.save(tmp_path / "scales.safetensors"))
        assert all(torch.equal(rows, again.rows[name]) for name, rows in scales.rows.items())
        one, two = (quantize_model(wan.copy(), W4A8, each).state_dict() for each in (scales, again))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


class TestRounding:
    def test_beats_nearest_on_fresh_inputs(self, wan, scales):
        figures = {
            rounding: fresh_sqnr_db(wan, quantize_model(wan.copy(), replace(W4A8, rounding=rounding), scales))
            for rounding in ("gptq", "nearest")
        }
        assert figures["gptq"] > figures["nearest"] + 0.5

    def test_changes_codes_by_little(self, wan, scales):
        """Neighbouring grid points, for the most part: the weights stay the weights."""
        name = "blocks.0.ffn.net.2"
        codes = {}
        for rounding in ("gptq", "nearest"):
            layer = quantize_model(wan.copy(), replace(W4A8, rounding=rounding), scales).get_submodule(name)
            codes[rounding] = unpack_int4(layer.weight, layer.weight_shape).float() * layer.weight_scale
        difference = (codes["gptq"] - codes["nearest"]).abs() / codes["nearest"].abs().amax()
        assert 0 < float(difference.mean()) < 0.1

    def test_auto_is_gptq_below_eight_bits_with_scales(self, wan, scales, wan_scales):
        def same(one: QuantSpec, two: QuantSpec, found: Scales | None) -> bool:
            first, second = (quantize_model(wan.copy(), each, found).state_dict() for each in (one, two))
            return all(torch.equal(tensor, second[name]) for name, tensor in first.items())

        nearest, gptq = (replace(W4A8, rounding=rounding) for rounding in ("nearest", "gptq"))
        assert same(W4A8, gptq, scales) and not same(W4A8, nearest, scales)
        assert same(W4A8, nearest, None)
        eight = replace(W4A8, weight_bits=8)
        assert same(eight, replace(eight, rounding="nearest"), scales)
        assert not same(eight, replace(eight, rounding="gptq"), scales)

    def test_gptq_needs_scales_with_samples(self, wan, wan_scales, unchanged):
        model = wan.copy()
        same = unchanged(model)
        for found, message in ((None, "needs calibrated scales"), (wan_scales, "hold no samples")):
            with pytest.raises(QVDError, match=message):
                quantize_model(model, replace(W4A8, rounding="gptq"), found)
        assert same()

    def test_convolutions_too(self, unet):
        """Rows are unfolded patches there. One random layer more or less: only that it is no worse."""
        scales = unet.calibrate(replace(W4A8, scale="none", shift=False))
        assert scales.rows["down_blocks.0.resnets.0.conv1"].shape[1] == 16 * 9
        gptq = unet.sqnr_db(quantize_model(unet.copy(), None, scales))
        nearest = unet.sqnr_db(quantize_model(unet.copy(), replace(scales.spec, rounding="nearest"), scales))
        assert gptq > nearest + 0.5
