"""The exported file in a ComfyUI that does not know QVD, and QVD's own file there."""

from typing import Any

import pytest
import torch

from tests.comfyui.client import Client
from tests.comfyui.graphs import Graph
from tests.comfyui.runs import fail, saved, sqnr_db, succeed
from tests.comfyui.server import Server

pytestmark = pytest.mark.comfyui
PORTABLE = "ComfyUI int8 (no pack needed)"
MINIMUM_DB = 30.0


def newest(server: Server, prefix: str) -> str:
    return max((server.folder("output") / "diffusion_models").glob(f"{prefix}_*.safetensors")).name


def test_the_export_runs_without_our_pack_and_matches(client: Client, server: Server, figure: Any) -> None:
    graph = Graph()
    model = graph.model("wan")
    int8 = graph.quantize(model)
    graph.save(graph.sample(model, "wan"), "stock_float")
    graph.save(graph.sample(int8, "wan"), "stock_ours")
    graph.add("QVDSaveCheckpoint", model=int8, filename_prefix="diffusion_models/portable", format=PORTABLE)
    graph.add("QVDSaveCheckpoint", model=int8, filename_prefix="diffusion_models/own", format="QVD")
    succeed(client, graph)
    portable, own = newest(server, "portable"), newest(server, "own")

    server.use_pack(False)
    try:
        server.restart()
        stock = Client(server.url)
        assert not [name for name in stock.object_info() if name.startswith("QVD") and "Test" not in name]
        graph = Graph()
        loaded = graph.add("UNETLoader", unet_name=portable, weight_dtype="default")
        sampled = graph.sample(loaded, "wan")
        graph.save(sampled, "stock")
        graph.save(graph.sample(graph.lora(loaded), "wan"), "stock_lora")
        hashed = graph.hash(loaded, "portable", sampled)
        result = succeed(stock, graph)
        assert "unet unexpected" not in server.log
        assert any("int8" in name.lower() or "Mixed" in name for name in result.outputs[hashed]["classes"][0])
        refused = Graph()
        loader = refused.add("UNETLoader", unet_name=own, weight_dtype="default")
        refused.save(refused.sample(loader, "wan"), "refused")
        assert "qvd" in fail(stock, refused, loader[0]).lower()
        assert server.alive()
    finally:
        server.stop()
        server.use_pack(True)
        server.restart()
    floating, ours, there = (saved(server, name) for name in ("stock_float", "stock_ours", "stock"))
    figure("SQNR of the export to float dB", sqnr_db(floating, there))
    figure("SQNR of ours to float dB", sqnr_db(floating, ours))
    figure("SQNR of the export to ours dB", sqnr_db(ours, there))
    # Both round the same float model to int8, so they may differ by as much as either differs from it.
    assert sqnr_db(floating, there) >= MINIMUM_DB
    assert sqnr_db(ours, there) >= MINIMUM_DB
    assert not torch.equal(saved(server, "stock_lora"), there)


def test_the_export_loads_with_our_pack_too(client: Client, server: Server) -> None:
    graph = Graph()
    int8 = graph.quantize(graph.model("wan"))
    graph.add("QVDSaveCheckpoint", model=int8, filename_prefix="diffusion_models/portable_here", format=PORTABLE)
    succeed(client, graph)
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name=newest(server, "portable_here"), weight_dtype="default")
    graph.save(graph.sample(loaded, "wan"), "portable_here")
    graph.save(graph.sample(graph.model("wan"), "wan"), "portable_float")
    succeed(client, graph)
    assert sqnr_db(saved(server, "portable_float"), saved(server, "portable_here")) >= MINIMUM_DB
