"""What users do wrong, on the real server: a message in plain words on the node, the server up, the MODEL unharmed."""

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.comfyui.client import Client
from tests.comfyui.graphs import CALIBRATION, Graph
from tests.comfyui.runs import fail, files, saved, succeed
from tests.comfyui.server import Server

pytestmark = pytest.mark.comfyui
# What a message for users does not hold: Python's own words.
INTERNAL = re.compile(
    r"Traceback|object has no attribute|NoneType|KeyError|not subscriptable|unexpected keyword|0x[0-9a-f]{6}"
)
Case = Callable[[Graph], str]  # draws the graph and returns the id of the node that should say something


def scales_missing(graph: Graph) -> str:
    scales = graph.add("QVDLoadScales", scales_name="nowhere.safetensors")
    graph.save(graph.sample(graph.quantize(graph.model("wan"), scales=scales), "wan"), "bad")
    return str(scales[0])


def scales_outside(graph: Graph) -> str:
    scales = graph.add("QVDLoadScales", scales_name="../diffusion_models/tiny_wan.safetensors")
    graph.save(graph.sample(graph.quantize(graph.model("wan"), scales=scales), "wan"), "bad")
    return str(scales[0])


def scales_corrupt(graph: Graph) -> str:
    scales = graph.add("QVDLoadScales", scales_name="bad_text.safetensors")
    graph.save(graph.sample(graph.quantize(graph.model("wan"), scales=scales), "wan"), "bad")
    return str(scales[0])


def scales_of_another_kind(graph: Graph) -> str:
    scales = graph.add("QVDLoadScales", scales_name="bad_unknown.safetensors")
    graph.save(graph.sample(graph.quantize(graph.model("wan"), scales=scales), "wan"), "bad")
    return str(scales[0])


def scales_of_another_model(graph: Graph) -> str:
    scales = graph.calibrate(graph.model("hunyuan"), "hunyuan", steps=2)
    int8 = graph.quantize(graph.model("wan"), scales=scales)
    graph.save(graph.sample(int8, "wan"), "bad")
    return str(int8[0])


def load(file: str) -> Case:
    def draw(graph: Graph) -> str:
        loaded = graph.add("QVDLoadDiffusionModel", unet_name=file)
        graph.save(graph.sample(loaded, "wan"), "bad")
        return str(loaded[0])

    return draw


def quantized_twice(graph: Graph) -> str:
    int8 = graph.quantize(graph.quantize(graph.model("wan")), "fast")
    graph.save(graph.sample(int8, "wan"), "bad")
    return str(int8[0])


def static_without_scales(graph: Graph) -> str:
    int8 = graph.quantize(graph.model("wan"), settings=graph.settings(activation="static"))
    graph.save(graph.sample(int8, "wan"), "bad")
    return str(int8[0])


def best_without_scales(graph: Graph) -> str:
    int8 = graph.quantize(graph.model("wan"), "best")
    graph.save(graph.sample(int8, "wan"), "bad")
    return str(int8[0])


def calibrate_int8(graph: Graph) -> str:
    scales = graph.calibrate(graph.quantize(graph.model("wan")), "wan")
    graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/bad")
    return str(scales[0])


def calibrate_empty_conditioning(graph: Graph) -> str:
    positive, negative = graph.text("wan", "", tokens=0), graph.text("wan", "blurry")
    scales = graph.add(
        "QVDCalibrate", model=graph.model("wan"), positive__positive0=positive, negative=negative,
        latent_image=graph.latent("wan"), preset="best", use_cache=False, **CALIBRATION,
    )  # fmt: skip
    graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/bad")
    return str(scales[0])


def calibrate_without_positive(graph: Graph) -> str:
    negative, latent = graph.text("wan", "blurry"), graph.latent("wan")
    more = {"preset": "best", "use_cache": False, **CALIBRATION}
    scales = graph.add("QVDCalibrate", model=graph.model("wan"), negative=negative, latent_image=latent, **more)
    graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/bad")
    return str(scales[0])


def calibrate_with_texts_of_another_model(graph: Graph) -> str:
    text = graph.text("hunyuan", "a fox")
    scales = graph.add(
        "QVDCalibrate", model=graph.model("wan"), positive__positive0=text, negative=text,
        latent_image=graph.latent("wan"), preset="best", use_cache=False, **CALIBRATION,
    )  # fmt: skip
    graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/bad")
    return str(scales[0])


def experts(switch_step: int, low: str = "wan_low") -> Case:
    def draw(graph: Graph) -> str:
        settings = {key: CALIBRATION[key] for key in ("seed", "steps", "sampler_name", "scheduler")}
        scales = graph.add(
            "QVDCalibrateTwoExperts", model_high=graph.model("wan"), model_low=graph.model(low),
            positive__positive0=graph.text("wan", "a fox"), negative=graph.text("wan", "blurry"),
            latent_image=graph.latent("wan"), switch_step=switch_step, cfg_high=3.0, cfg_low=3.0, preset="best",
            use_cache=False, **settings,
        )  # fmt: skip
        graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/bad")
        return str(scales[0])

    return draw


def save_float(graph: Graph) -> str:
    model = graph.model("wan")
    return str(graph.add("QVDSaveCheckpoint", model=model, filename_prefix="diffusion_models/bad", format="QVD")[0])


def save_outside(graph: Graph) -> str:
    int8 = graph.quantize(graph.model("wan"))
    return str(graph.add("QVDSaveCheckpoint", model=int8, filename_prefix="../../bad", format="QVD")[0])


def save_scales_outside(graph: Graph) -> str:
    scales = graph.calibrate(graph.model("wan"), "wan")
    return str(graph.add("QVDSaveScales", scales=scales, filename_prefix="../../bad")[0])


def report_of_float(graph: Graph) -> str:
    return str(graph.add("QVDReport", model=graph.model("wan"), filename_prefix="bad")[0])


def compare(**test: int) -> Case:
    def draw(graph: Graph) -> str:
        size = {"width": 64, "height": 64, "frames": 3, "noise": 0.0}
        reference, other = graph.add("QVDTestImage", **size), graph.add("QVDTestImage", **(size | test))
        node = graph.add("QVDCompare", reference=reference, test=other, amplify=8.0)
        return str(node[0])

    return draw


CASES: dict[str, tuple[Case, str]] = {
    "scales that are not there": (scales_missing, "nowhere.safetensors"),
    "scales outside the folder": (scales_outside, "tiny_wan"),
    "scales that are no safetensors file": (scales_corrupt, "bad_text"),
    "a file that holds no scales": (scales_of_another_kind, "scales"),
    "scales of another model": (scales_of_another_model, "scales"),
    "a checkpoint that was cut": (load("bad_cut.safetensors"), "bad_cut"),
    "a checkpoint that is a text": (load("bad_text.safetensors"), "bad_text"),
    "a checkpoint of no known model": (load("bad_unknown.safetensors"), "bad_unknown"),
    "a checkpoint that is not there": (load("nowhere.safetensors"), "nowhere"),
    "a float checkpoint in the int8 loader": (load("tiny_wan.safetensors"), "tiny_wan"),
    "a model quantized twice": (quantized_twice, "already|twice"),
    "static settings without scales": (static_without_scales, "scales"),
    "the preset best without scales": (best_without_scales, "scales"),
    "calibration of an int8 model": (calibrate_int8, "already|float|int8"),
    "calibration with an empty conditioning": (calibrate_empty_conditioning, "positive|empty|conditioning"),
    "calibration without a positive conditioning": (calibrate_without_positive, "positive"),
    "calibration with texts of another model": (calibrate_with_texts_of_another_model, ""),
    "two experts that switch before the first step": (experts(0), "switch"),
    "two experts that switch after the last step": (experts(9), "switch"),
    "two experts of different models": (experts(2, "hunyuan"), "different"),
    "saving a float model": (save_float, "quantize|Quantize"),
    "saving outside the output folder": (save_outside, "output"),
    "saving scales outside the output folder": (save_scales_outside, "output"),
    "a report of a float model": (report_of_float, "quantize|Quantize"),
    "comparing frames of two sizes": (compare(width=32), "64|32|size"),
    "comparing different numbers of frames": (compare(frames=2), "frame"),
}


@pytest.fixture(scope="module")
def reference(server: Server) -> Iterator[torch.Tensor]:
    """What the float model samples before anything went wrong; compared again after the last test."""
    graph = Graph()
    graph.save(graph.sample(graph.model("wan"), "wan", seed=77), "unharmed")
    succeed(Client(server.url), graph)
    before = saved(server, "unharmed")
    yield before
    assert server.alive()


@pytest.mark.parametrize("name", CASES)
def test_says_so_on_the_node(name: str, client: Client, server: Server, reference: torch.Tensor, figure: Any) -> None:
    draw, words = CASES[name]
    graph = Graph()
    node = draw(graph)
    message = fail(client, graph, node)
    shown = message.replace(str(server.base), "…").replace(str(server.base.parent), "…")
    figure("says", f'"{shown}"')
    assert message
    assert not INTERNAL.search(message), message
    assert re.search(words, message), message
    assert len(message) < 1000
    assert server.alive()
    after = Graph()
    after.save(after.sample(after.model("wan"), "wan", seed=77), "unharmed_after")
    succeed(client, after)
    assert torch.equal(saved(server, "unharmed_after"), reference)


@contextmanager
def full_disk(server: Server) -> Iterator[None]:
    """No file of the server can grow beyond 4 kB meanwhile: what it writes fails, as on a full disk."""
    if sys.platform != "linux":
        pytest.skip("only Linux limits another process's files")
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


class TestFullDisk:
    @pytest.mark.parametrize("format_", ["QVD", "ComfyUI int8 (no pack needed)"])
    def test_a_checkpoint_is_not_half_written(self, format_, client, server, reference):
        graph = Graph()
        int8 = graph.quantize(graph.model("wan"))
        prefix = "diffusion_models/full"
        node = graph.add("QVDSaveCheckpoint", model=int8, filename_prefix=prefix, format=format_)
        before = files(server.folder("output"))
        with full_disk(server):
            message = fail(client, graph, str(node[0]))
        assert "full" in message or "write" in message or "large" in message, message
        assert not INTERNAL.search(message), message
        assert files(server.folder("output")) == before
        assert server.alive()
        succeed(client, graph)

    def test_scales_are_not_half_written(self, client, server, reference):
        graph = Graph()
        scales = graph.calibrate(graph.model("wan"), "wan")
        graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/room")
        succeed(client, graph)
        node = graph.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/full")
        before = files(server.folder("output"))
        with full_disk(server):
            message = fail(client, graph, str(node[0]))
        assert not INTERNAL.search(message), message
        assert files(server.folder("output")) == before
        succeed(client, graph)

    def test_a_cache_that_cannot_be_written_costs_nothing_but_the_cache(self, client, server, reference):
        graph = Graph()
        model = graph.model("wan")
        scales = graph.calibrate(model, "wan", "no room for this")
        int8 = graph.quantize(model, scales=scales)
        hashed = graph.hash(int8, "full")
        before = files(server.cache)
        with full_disk(server):
            result = succeed(client, graph)
        assert result.outputs[hashed]["text"]
        assert result.outputs[scales[0]]["qvd"][0]["warnings"]
        assert files(server.cache) == before
