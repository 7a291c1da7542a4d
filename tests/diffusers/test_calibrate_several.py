"""Calibrating what is not one denoiser in memory: two experts, offloaded models, models only their files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file, save_file

from qvd_core.layers import QuantizedLayer
from qvd_diffusers import QVDConfig, QVDError, Scales, calibrate
from tests.diffusers.tiny import PROMPTS, WAN_CALL, group_offload, sample_frames

EXPERTS = ("transformer", "transformer_2")


def same(first: Scales, second: Scales, tolerance: float = 0.0) -> bool:
    """Whether two calibrations found the same, up to a relative difference of their tensors."""
    if first.layers.keys() != second.layers.keys() or first.temporal.keys() != second.temporal.keys():
        return False
    pairs = [
        (tensor, second.layers[name].tensors()[key])
        for name, layer in first.layers.items()
        for key, tensor in layer.tensors().items()
    ]
    return all(torch.allclose(one, two, rtol=tolerance, atol=tolerance) for one, two in pairs)


@pytest.fixture(scope="module")
def scales(wan22_folder: Path) -> dict[str, Scales]:
    """Of both experts."""
    pipe = DiffusionPipeline.from_pretrained(wan22_folder)
    return calibrate(pipe, PROMPTS, cache=False, progress=False, **WAN_CALL)


class TestTwoExperts:
    def test_one_run_calibrates_both(self, wan22_folder: Path, scales: dict[str, Scales]) -> None:
        assert tuple(scales) == EXPERTS
        pipe = DiffusionPipeline.from_pretrained(wan22_folder)
        alone = calibrate(pipe, PROMPTS, component="transformer_2", cache=False, progress=False, **WAN_CALL)
        assert same(scales["transformer_2"], alone) and not same(scales["transformer"], alone)
        steps = [scales[name].calibrated_on["forward_passes"] for name in EXPERTS]
        assert all(steps) and sum(steps) == 2 * len(PROMPTS) * WAN_CALL["num_inference_steps"]

    def test_each_is_quantized_with_its_own(
        self, wan22_folder: Path, scales: dict[str, Scales], tmp_path: Path
    ) -> None:
        paths = {name: scales[name].save(tmp_path / f"{name}.safetensors") for name in EXPERTS}
        pipe = DiffusionPipeline.from_pretrained(wan22_folder, quantization_config=QVDConfig(scales=paths))
        again = DiffusionPipeline.from_pretrained(wan22_folder, quantization_config=QVDConfig(scales=scales))
        for name in EXPERTS:
            state = getattr(pipe, name).state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(again, name).state_dict().items())
            layer = getattr(pipe, name).get_submodule("blocks.0.ffn.net.2")
            found = scales[name].layers["blocks.0.ffn.net.2"]
            assert layer.input_scale is None or torch.equal(layer.input_scale, found.input_scale)
        reference = sample_frames(DiffusionPipeline.from_pretrained(wan22_folder), WAN_CALL)
        assert (sample_frames(pipe, WAN_CALL) - reference).std() < 0.03 * reference.std()
        pipe.save_pretrained(tmp_path / "int8")
        reloaded = DiffusionPipeline.from_pretrained(tmp_path / "int8")
        for name in EXPERTS:
            state = getattr(pipe, name).state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(reloaded, name).state_dict().items())

    def test_both_are_cached(self, wan22_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pipe = DiffusionPipeline.from_pretrained(wan22_folder)
        first, second = (calibrate(pipe, PROMPTS[0], **WAN_CALL) for _ in range(2))
        assert "Using cached scales" in capsys.readouterr().out
        assert all(same(first[name], second[name]) for name in EXPERTS)

    def test_the_scales_of_one_expert_do_not_pass_for_the_other(
        self, wan22_folder: Path, scales: dict[str, Scales]
    ) -> None:
        swapped = {"transformer": scales["transformer_2"], "transformer_2": scales["transformer"]}
        for wrong in (scales["transformer"], swapped):
            with pytest.raises(QVDError, match="calibrated on"):
                DiffusionPipeline.from_pretrained(wan22_folder, quantization_config=QVDConfig(scales=wrong))
        with pytest.raises(QVDError, match="given for transformer, but transformer_2 is to be quantized, too"):
            config = QVDConfig(scales={"transformer": scales["transformer"]})
            DiffusionPipeline.from_pretrained(wan22_folder, quantization_config=config)
        with pytest.raises(QVDError, match="for the components transformer, transformer_2"):
            kind = type(DiffusionPipeline.from_pretrained(wan22_folder).transformer)
            kind.from_pretrained(wan22_folder, subfolder="transformer", quantization_config=QVDConfig(scales=scales))

    def test_an_expert_that_never_runs_is_named(self, wan22_folder: Path) -> None:
        pipe = DiffusionPipeline.from_pretrained(wan22_folder)
        pipe.register_to_config(boundary_ratio=0.0)
        with pytest.raises(QVDError, match="never called the model"):
            calibrate(pipe, PROMPTS[0], cache=False, progress=False, **WAN_CALL)


OFFLOADING: dict[str, Any] = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe, folder: accelerate.cpu_offload(pipe.transformer, torch.device("cpu")),
    "sequential, from disk": lambda pipe, folder: accelerate.disk_offload(
        pipe.transformer, folder, torch.device("cpu")
    ),
    "groups of blocks": lambda pipe, folder: group_offload(
        pipe.transformer, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=None
    ),
    "groups of blocks, from disk": lambda pipe, folder: group_offload(
        pipe.transformer, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaves, from disk": lambda pipe, folder: group_offload(
        pipe.transformer, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}


@pytest.fixture(scope="module")
def expected(wan_folder: Path) -> Scales:
    """What a pipeline that is all in memory finds."""
    return calibrate(WanPipeline.from_pretrained(wan_folder), PROMPTS[0], cache=False, progress=False, **WAN_CALL)


class TestOffloaded:
    @pytest.mark.parametrize("way", OFFLOADING)
    def test_the_same_scales_are_found(self, way: str, wan_pipe: WanPipeline, expected: Scales, tmp_path: Path) -> None:
        OFFLOADING[way](wan_pipe, tmp_path)
        found = calibrate(wan_pipe, PROMPTS[0], progress=False, **WAN_CALL)
        assert same(found, expected, tolerance=1e-4)
        for name, codebook in expected.temporal.items():
            torch.testing.assert_close(found.temporal[name].levels, codebook.levels)


class TestFromFiles:
    """The denoiser is in int8 while it is observed; the float weights stay on disk."""

    @pytest.fixture
    def small_pipe(self, wan_folder: Path) -> WanPipeline:
        return WanPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig(backend="weight_only"))

    def test_nearly_the_scales_of_the_float_model(self, small_pipe: WanPipeline, wan_folder: Path) -> None:
        found = calibrate(small_pipe, PROMPTS, weights=wan_folder, progress=False, **WAN_CALL)
        expected = calibrate(WanPipeline.from_pretrained(wan_folder), PROMPTS, progress=False, **WAN_CALL)
        assert found.layers.keys() == expected.layers.keys() and found.fingerprint == expected.fingerprint
        for name, layer in expected.layers.items():
            assert torch.equal(found.layers[name].weight_probe, layer.weight_probe)
            reach = (layer.input_max - layer.input_min).max()
            assert (found.layers[name].input_max - layer.input_max).abs().max() < 0.05 * reach
        assert any(isinstance(module, QuantizedLayer) for module in small_pipe.transformer.modules())
        config = QVDConfig(scales=found)
        frames = sample_frames(WanPipeline.from_pretrained(wan_folder, quantization_config=config), WAN_CALL)
        reference = sample_frames(WanPipeline.from_pretrained(wan_folder), WAN_CALL)
        assert (frames - reference).std() < 0.03 * reference.std()

    def test_it_is_cached(self, small_pipe: WanPipeline, wan_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        calibrate(small_pipe, PROMPTS[:1], weights=wan_folder, **WAN_CALL)
        calibrate(small_pipe, PROMPTS[:1], weights=wan_folder / "transformer", **WAN_CALL)
        assert "Using cached scales" in capsys.readouterr().out

    def test_weights_of_other_layers_are_refused(
        self, small_pipe: WanPipeline, wan_folder: Path, tmp_path: Path
    ) -> None:
        (source,) = (wan_folder / "transformer").glob("*.safetensors")
        state = load_file(source)
        name = "blocks.1.ffn.net.2.weight"
        wrong = {
            "int8": {**state, name: state[name].to(torch.int8)},
            "no blocks.1.ffn.net.2.weight": {key: value for key, value in state.items() if key != name},
            "another model": {**state, name: state[name][:, :3].clone()},
            "NaN": {**state, name: state[name] * torch.nan},
        }
        for message, tensors in wrong.items():
            path = tmp_path / "weights.safetensors"
            save_file(tensors, path)
            with pytest.raises(QVDError, match=message):
                calibrate(small_pipe, PROMPTS[0], weights=path, cache=False, progress=False, **WAN_CALL)

    def test_where_there_are_no_weights(self, small_pipe: WanPipeline, wan_pipe: WanPipeline, tmp_path: Path) -> None:
        with pytest.raises(QVDError, match="holds no safetensors"):
            calibrate(small_pipe, PROMPTS[0], weights=tmp_path, **WAN_CALL)
        with pytest.raises(QVDError, match="neither a folder, a file nor a name"):
            calibrate(small_pipe, PROMPTS[0], weights=tmp_path / "nothing" / "here", **WAN_CALL)
        with pytest.raises(QVDError, match="weights="):
            calibrate(small_pipe, PROMPTS[0], **WAN_CALL)
        with pytest.raises(QVDError, match="in full precision"):
            calibrate(wan_pipe, PROMPTS[0], weights=tmp_path, **WAN_CALL)
        with pytest.raises(QVDError, match="without weights="):
            calibrate(small_pipe, PROMPTS[0], weights=tmp_path, sensitivity=True, **WAN_CALL)
