"""Calibration on the real server: progress, the disk cache over a restart, interruption, two experts, saved scales."""

from typing import Any

import pytest
import torch

from tests.comfyui.client import Client
from tests.comfyui.graphs import CALIBRATION, Graph
from tests.comfyui.runs import files, qvd, saved, sqnr_db, succeed
from tests.comfyui.server import Server

pytestmark = pytest.mark.comfyui
MINIMUM_DB = 30.0


def next_key(change: dict[str, Any]) -> str:
    """What a change is of, as the name of a test."""
    return next(iter(change))


def calibrated(*texts: str, **settings: Any) -> tuple[Graph, str, str]:
    """Calibrate Wan, quantize, sample; the graph and the ids of two nodes."""
    graph = Graph()
    model = graph.model("wan")
    scales = graph.calibrate(model, "wan", *texts, **settings)
    int8 = graph.quantize(model, scales=scales)
    graph.save(graph.sample(int8, "wan"), "calibrated")
    return graph, str(scales[0]), str(int8[0])


def test_the_disk_cache_is_hit_after_a_restart_and_says_so(client: Client, server: Server, figure: Any) -> None:
    graph, node, _ = calibrated("a lighthouse", "a harbour")
    first = qvd(succeed(client, graph), node)
    before = saved(server, "calibrated")
    assert first["cache_hit"] is False
    assert first["layers"] > 0  # type: ignore[operator]
    assert first["file"] in {name.rpartition("/")[2] for name in files(server.cache)}
    server.restart()
    result = succeed(Client(server.url), graph)
    second = qvd(result, node)
    figure("seconds without", float(first["seconds"]))  # type: ignore[arg-type]
    figure("seconds with cache", float(second["seconds"]))  # type: ignore[arg-type]
    assert second["cache_hit"] is True
    assert second["file"] == first["file"]
    assert "cache" in " ".join(result.outputs[node]["text"]).lower()
    assert torch.equal(saved(server, "calibrated"), before)


def test_without_the_cache_it_runs_again(client: Client) -> None:
    graph, node, _ = calibrated("a bridge")
    succeed(client, graph)
    again, node, _ = calibrated("a bridge", use_cache=False)
    assert qvd(succeed(client, again), node)["cache_hit"] is False


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"steps": 3}, {"cfg": 2.0}, {"sampler_name": "dpmpp_2m"}], ids=next_key
)
def test_another_way_of_sampling_is_another_calibration(change: dict[str, Any], client: Client) -> None:
    graph, node, _ = calibrated("a tower")
    succeed(client, graph)
    other, node, _ = calibrated("a tower", **change)
    assert qvd(succeed(client, other), node)["cache_hit"] is False


def test_a_lora_is_another_calibration(client: Client) -> None:
    graph, node, _ = calibrated("a well")
    succeed(client, graph)
    other = Graph()
    scales = other.calibrate(other.lora(other.model("wan")), "wan", "a well")
    other.add("QVDSaveScales", scales=scales, filename_prefix="qvd_scales/with_lora")
    assert qvd(succeed(client, other), str(scales[0]))["cache_hit"] is False


def test_an_unchanged_graph_is_not_run_again_and_still_says_what_it_did(client: Client) -> None:
    graph, node, int8 = calibrated("a garden")
    first = succeed(client, graph)
    graph.save(graph.sample([int8, 0], "wan", seed=99), "another_seed")
    second = succeed(client, graph)
    assert {node, int8} <= second.cached
    assert second.outputs[node]["qvd"] == first.outputs[node]["qvd"]
    assert second.outputs[int8]["qvd"] == first.outputs[int8]["qvd"]


def test_progress_goes_to_the_front_end(client: Client) -> None:
    graph, node, _ = calibrated("a market", "a square", steps=3)
    result = succeed(client, graph)
    events = result.of("qvd.calibration")
    assert events, "no qvd.calibration message"
    assert all(event["node"] == node for event in events)
    assert events[-1]["phase"] == "done"
    sampling = [event for event in events if event["phase"] == "sampling"]
    assert {(event["prompts"], event["steps"]) for event in sampling} == {(2, 3)}
    done = [event["done"] for event in events]
    assert done == sorted(done)
    layers = {name for event in events for name, _ in event["sqnr_db"]}
    assert layers


def test_the_float_model_is_unharmed(client: Client) -> None:
    graph = Graph()
    before = graph.hash(graph.model("wan"), "before calibration")
    first = succeed(client, graph)
    graph, _, _ = calibrated("a window", use_cache=False)
    saver = next(key for key, node in graph.prompt.items() if node["class_type"] == "KSampler")
    after = graph.hash(graph.model("wan"), "after calibration", [saver, 0])
    second = succeed(client, graph)
    for key in ("text", "classes", "hooks"):
        assert second.outputs[after][key] == first.outputs[before][key]


def test_an_interrupted_calibration_leaves_nothing_and_the_next_works(client: Client, server: Server) -> None:
    graph = Graph()
    before = graph.hash(graph.model("wan"), "before interruption")
    first = succeed(client, graph)
    kept = files(server.base / "output"), files(server.base / "temp")
    graph, node, _ = calibrated("a long road", "a longer road", "the longest road", steps=60)
    stopped: list[str] = []

    def stop(kind: str, data: dict[str, Any]) -> None:
        moving = kind == "progress" and data.get("value", 0) >= 2 and data.get("node") == node
        if not stopped and (moving or (kind == "qvd.calibration" and data.get("step", 0) >= 2)):
            stopped.append(kind)
            client.interrupt()

    result = client.run(graph.prompt, on_message=stop)
    assert stopped
    assert result.status == "interrupted"
    assert (files(server.base / "output"), files(server.base / "temp")) == kept
    assert not [name for name in files(server.cache) if name.endswith((".tmp", ".lock", ".part"))]
    check = Graph()
    after = check.hash(check.model("wan"), "after interruption")
    second = succeed(client, check)
    for key in ("text", "classes", "hooks"):
        assert second.outputs[after][key] == first.outputs[before][key]
    graph, node, _ = calibrated("a long road", "a longer road", "the longest road", steps=3)
    assert qvd(succeed(client, graph), node)["cache_hit"] is False


def test_saved_scales_load_and_give_the_same_model(client: Client, server: Server) -> None:
    graph, node, _ = calibrated("a meadow")
    graph.add("QVDSaveScales", scales=[node, 0], filename_prefix="qvd_scales/meadow")
    succeed(client, graph)
    direct = saved(server, "calibrated")
    written = sorted(path.name for path in (server.folder("output") / "qvd_scales").glob("meadow_*.safetensors"))
    graph = Graph()
    scales = graph.add("QVDLoadScales", scales_name=written[-1])
    graph.save(graph.sample(graph.quantize(graph.model("wan"), scales=scales), "wan"), "from_scales")
    succeed(client, graph)
    assert torch.equal(saved(server, "from_scales"), direct)


def test_two_experts_each_get_scales_of_their_own(client: Client, server: Server, figure: Any) -> None:
    graph = Graph()
    high, low = graph.model("wan"), graph.model("wan_low")
    positive, negative, latent = graph.text("wan", "a cliff"), graph.text("wan", "blurry"), graph.latent("wan")
    settings = {key: CALIBRATION[key] for key in ("seed", "steps", "sampler_name", "scheduler")}
    scales = graph.add(
        "QVDCalibrateTwoExperts", model_high=high, model_low=low, positive__positive0=positive, negative=negative,
        latent_image=latent, switch_step=2, cfg_high=3.0, cfg_low=2.0, preset="best", use_cache=True, **settings,
    )  # fmt: skip
    int8 = graph.quantize(high, scales=scales), graph.quantize(low, scales=[scales[0], 1])
    for kind, (first, second) in (("float", (high, low)), ("int8", int8)):
        shared = {
            "steps": 4,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": positive,
            "negative": negative,
        }
        begun = graph.add(
            "KSamplerAdvanced", model=first, add_noise="enable", noise_seed=1, cfg=3.0, latent_image=latent,
            start_at_step=0, end_at_step=2, return_with_leftover_noise="enable", **shared,
        )  # fmt: skip
        ended = graph.add(
            "KSamplerAdvanced", model=second, add_noise="disable", noise_seed=1, cfg=2.0, latent_image=begun,
            start_at_step=2, end_at_step=10000, return_with_leftover_noise="disable", **shared,
        )  # fmt: skip
        graph.save(ended, f"experts_{kind}")
    result = succeed(client, graph)
    value = sqnr_db(saved(server, "experts_float"), saved(server, "experts_int8"))
    figure("SQNR dB", value)
    assert value >= MINIMUM_DB
    experts = {event.get("expert") for event in result.of("qvd.calibration")}
    assert {"high", "low"} <= experts


def test_scales_of_one_expert_do_not_fit_the_other(client: Client) -> None:
    graph = Graph()
    scales = graph.calibrate(graph.model("wan"), "wan", "a shore")
    int8 = graph.quantize(graph.model("wan_low"), scales=scales)
    graph.save(graph.sample(int8, "wan_low"), "wrong_expert")
    result = client.run(graph.prompt)
    if result.status == "error":
        assert result.failed_node == int8[0]
        assert "scales" in result.error
    else:
        assert qvd(result, int8[0])["warnings"]
