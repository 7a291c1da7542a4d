"""int8 on the real server against float: quality, the float MODEL afterwards, LoRA, files."""

import math
from typing import Any

import pytest
import torch

from tests.comfyui.client import Client
from tests.comfyui.graphs import Graph
from tests.comfyui.runs import cosine, psnr_db, qvd, saved, sqnr_db, succeed
from tests.comfyui.server import Server

pytestmark = pytest.mark.comfyui
MINIMUM_DB = 30.0
MINIMUM_COSINE = 0.99
VIDEO = ("wan", "hunyuan", "svd", "ltxv")
DECODED = ("wan", "hunyuan", "svd")


@pytest.mark.parametrize("name", VIDEO)
def test_latents_and_frames_keep_30_db(name: str, client: Client, server: Server, figure: Any) -> None:
    graph = Graph()
    model = graph.model(name)
    for kind, chosen in (("float", model), ("int8", graph.quantize(model))):
        sampled = graph.sample(chosen, name)
        graph.save(sampled, f"{name}_{kind}")
        if name in DECODED:
            graph.save_images(graph.decode(sampled, name), f"{name}_frames_{kind}")
    succeed(client, graph)
    latents = sqnr_db(saved(server, f"{name}_float"), saved(server, f"{name}_int8"))
    figure("latents SQNR dB", latents)
    assert MINIMUM_DB <= latents < math.inf
    if name in DECODED:
        frames = psnr_db(saved(server, f"{name}_frames_float"), saved(server, f"{name}_frames_int8"))
        figure("frames PSNR dB", frames)
        assert frames >= MINIMUM_DB


@pytest.mark.parametrize("preset", ["fast", "best", "paper"])
def test_every_preset_keeps_30_db_with_calibrated_scales(
    preset: str, client: Client, server: Server, figure: Any
) -> None:
    graph = Graph()
    model = graph.model("wan")
    scales = graph.calibrate(model, "wan", "a river", "a mountain", preset=preset)
    int8 = graph.quantize(model, preset, scales=scales)
    graph.save(graph.sample(model, "wan"), "preset_float")
    graph.save(graph.sample(int8, "wan"), "preset_int8")
    result = succeed(client, graph)
    value = sqnr_db(saved(server, "preset_float"), saved(server, "preset_int8"))
    figure("SQNR dB", value)
    assert qvd(result, int8[0])["calibrated"] is True
    assert MINIMUM_DB <= value < math.inf


@pytest.mark.parametrize("name", [*VIDEO, "flux"])
def test_the_float_model_is_bit_identical_afterwards(name: str, client: Client, server: Server) -> None:
    graph = Graph()
    model = graph.model(name)
    sampled = graph.sample(model, name)
    graph.save(sampled, "before")
    before = graph.hash(model, "before", sampled)
    first = succeed(client, graph)
    graph = Graph()
    model = graph.model(name)
    int8 = graph.quantize(model)
    sampled = graph.sample(int8, name)
    again = graph.sample(model, name, denoise=0.9999999)  # another value: the cached sample would show nothing
    graph.save(again, "after")
    after = graph.hash(model, "after", sampled)
    changed = graph.hash(int8, "int8", sampled)
    second = succeed(client, graph)
    assert second.outputs[after]["text"] == first.outputs[before]["text"]
    assert second.outputs[after]["classes"] == first.outputs[before]["classes"]
    assert second.outputs[after]["hooks"] == [0]
    assert second.outputs[changed]["text"] != first.outputs[before]["text"]
    assert torch.equal(saved(server, "before"), saved(server, "after"))


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_lora_changes_the_output_as_in_float(order: str, client: Client, server: Server, figure: Any) -> None:
    graph = Graph()
    model = graph.model("wan")
    with_lora = graph.lora(model)
    int8 = graph.quantize(model)
    int8_with_lora = graph.quantize(with_lora) if order == "before" else graph.lora(int8)
    chosen = {"float": model, "float_lora": with_lora, "int8": int8, "int8_lora": int8_with_lora}
    for name, one in chosen.items():
        graph.save(graph.sample(one, "wan"), f"lora_{name}")
    succeed(client, graph)
    latents = {name: saved(server, f"lora_{name}") for name in chosen}
    expected, found = latents["float_lora"] - latents["float"], latents["int8_lora"] - latents["int8"]
    figure("cosine", f"{cosine(expected, found):.4f}")
    figure("delta of the output %", 100 * (expected.norm() / latents["float"].norm()).item())
    figure("SQNR with LoRA dB", sqnr_db(latents["float_lora"], latents["int8_lora"]))
    assert expected.norm() > 0.05 * latents["float"].norm()
    assert cosine(expected, found) >= MINIMUM_COSINE


def test_two_quantized_models_of_one_loader_are_independent(client: Client, server: Server) -> None:
    alone, both = Graph(), Graph()
    alone.save(alone.sample(alone.quantize(alone.model("wan"), "fast"), "wan"), "alone")
    model = both.model("wan")
    scales = both.calibrate(model, "wan")
    one, other = both.quantize(model, "fast"), both.quantize(model, scales=scales)
    for name, int8 in (("other", other), ("together", one)):
        both.save(both.sample(int8, "wan", cfg=3.0), name)
    succeed(client, alone)
    succeed(client, both)
    assert torch.equal(saved(server, "alone"), saved(server, "together"))
    assert not torch.equal(saved(server, "other"), saved(server, "together"))


@pytest.mark.parametrize("name", ["wan", "hunyuan", "svd"])
def test_a_saved_checkpoint_samples_the_same_bits(name: str, client: Client, server: Server, figure: Any) -> None:
    graph = Graph()
    int8 = graph.quantize(graph.model(name))
    graph.save(graph.sample(int8, name), "from_memory")
    graph.add("QVDSaveCheckpoint", model=int8, filename_prefix=f"diffusion_models/qvd_{name}", format="QVD")
    succeed(client, graph)
    files = sorted((server.folder("output") / "diffusion_models").glob(f"qvd_{name}_*.safetensors"))
    graph = Graph()
    loaded = graph.add("QVDLoadDiffusionModel", unet_name=files[-1].name)
    graph.save(graph.sample(loaded, name), "from_file")
    result = succeed(client, graph)
    figure("MiB", files[-1].stat().st_size / 2**20)
    assert qvd(result, loaded[0])["layers"]
    assert torch.equal(saved(server, "from_memory"), saved(server, "from_file"))


def test_a_lora_on_a_loaded_checkpoint_acts_as_on_the_quantized_model(client: Client, server: Server) -> None:
    graph = Graph()
    int8 = graph.quantize(graph.model("wan"))
    graph.save(graph.sample(graph.lora(int8), "wan"), "lora_from_memory")
    graph.add("QVDSaveCheckpoint", model=int8, filename_prefix="diffusion_models/qvd_for_lora", format="QVD")
    succeed(client, graph)
    file = max((server.folder("output") / "diffusion_models").glob("qvd_for_lora_*.safetensors")).name
    graph = Graph()
    graph.save(graph.sample(graph.lora(graph.add("QVDLoadDiffusionModel", unet_name=file)), "wan"), "lora_from_file")
    succeed(client, graph)
    assert sqnr_db(saved(server, "lora_from_memory"), saved(server, "lora_from_file")) > 60


def test_an_image_model_is_quantized_with_a_word_about_it(client: Client, server: Server, figure: Any) -> None:
    graph = Graph()
    model = graph.model("flux")
    int8 = graph.quantize(model)
    graph.save(graph.sample(model, "flux"), "flux_float")
    graph.save(graph.sample(int8, "flux"), "flux_int8")
    result = succeed(client, graph)
    figure("SQNR dB", sqnr_db(saved(server, "flux_float"), saved(server, "flux_int8")))
    said = " ".join([*map(str, qvd(result, int8[0])["warnings"]), *result.outputs[int8[0]]["text"]])  # type: ignore[call-overload]
    assert "image" in said.lower() or "video" in said.lower(), said


def test_settings_take_the_place_of_the_preset(client: Client, server: Server) -> None:
    graph = Graph()
    model = graph.model("wan")
    eight, four = graph.quantize(model), graph.quantize(model, settings=graph.settings(weight_bits=4))
    for name, int8 in (("settings_8", eight), ("settings_4", four)):
        graph.save(graph.sample(int8, "wan"), name)
    result = succeed(client, graph)
    assert qvd(result, eight[0])["bits"] == "W8A8"
    assert qvd(result, four[0])["bits"] == "W4A8"
    assert sqnr_db(saved(server, "settings_8"), saved(server, "settings_4")) < 40
