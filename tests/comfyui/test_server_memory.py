"""After `/free`, which unloads every model, and after the float file has gone: int8 goes on as before."""

import pytest
import torch

from tests.comfyui.client import Client
from tests.comfyui.graphs import Graph
from tests.comfyui.runs import saved, succeed
from tests.comfyui.server import Server

pytestmark = pytest.mark.comfyui


def graph_of(lora: bool, name: str, seed: int) -> Graph:
    graph = Graph()
    int8 = graph.quantize(graph.model("wan"))
    graph.save(graph.sample(graph.lora(int8) if lora else int8, "wan", seed=seed), name)
    return graph


@pytest.mark.parametrize("forget", [False, True], ids=["unload", "unload and forget"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_free_then_run_again(lora: bool, forget: bool, client: Client, server: Server) -> None:
    succeed(client, graph_of(lora, "first", 11))
    client.free(unload_models=True, free_memory=forget)
    succeed(client, graph_of(lora, "between", 12))
    client.free(unload_models=True, free_memory=forget)
    succeed(client, graph_of(lora, "again", 11))
    assert torch.equal(saved(server, "first"), saved(server, "again"))
    assert not torch.equal(saved(server, "first"), saved(server, "between"))


def test_free_then_a_loaded_checkpoint_runs_again(client: Client, server: Server) -> None:
    graph = Graph()
    int8 = graph.quantize(graph.model("wan"))
    graph.add("QVDSaveCheckpoint", model=int8, filename_prefix="diffusion_models/qvd_free", format="QVD")
    succeed(client, graph)
    file = max((server.folder("output") / "diffusion_models").glob("qvd_free_*.safetensors")).name
    for name in ("loaded", "loaded_again"):
        graph = Graph()
        graph.save(graph.sample(graph.add("QVDLoadDiffusionModel", unet_name=file), "wan", seed=13), name)
        succeed(client, graph)
        client.free()
    assert torch.equal(saved(server, "loaded"), saved(server, "loaded_again"))
