"""What the tests of the real server share: run a graph, read what it saved, measure it."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.comfyui.client import Client, Prompt, Rejected, Result
from tests.comfyui.graphs import Graph
from tests.comfyui.server import Server


def succeed(client: Client, graph: Graph | Prompt, **options: object) -> Result:
    """Run a graph that must succeed."""
    prompt = graph.prompt if isinstance(graph, Graph) else graph
    try:
        result = client.run(prompt, **options)  # type: ignore[arg-type]
    except Rejected as error:
        raise AssertionError(f"rejected: {error.text}") from error
    assert result.status == "success", f"node {result.failed_node}: {result.error}\n{result.traceback}"
    assert not result.node_errors, result.node_errors
    return result


def fail(client: Client, graph: Graph, node: str) -> str:
    """Run a graph that must fail on that node; the message on it, or that of the server which refused it."""
    try:
        result = client.run(graph.prompt)
    except Rejected as error:
        assert node in error.node_errors, error.node_errors
        return error.text
    if result.status == "success":
        assert node in result.node_errors, f"node {node} took it"
        return " | ".join(f"{item['message']} {item['details']}" for item in result.node_errors[node]["errors"])
    assert result.status == "error", result.status
    assert result.failed_node == node, f"failed at {result.failed_node}: {result.error}"
    return result.error


def saved(server: Server, name: str) -> torch.Tensor:
    """What QVDTestSaveLatent or QVDTestSaveImages wrote, float32."""
    tensor = load_file(str(server.folder("output") / f"{name}.safetensors"))["value"]
    assert tensor.isfinite().all(), name
    return tensor


def sqnr_db(reference: torch.Tensor, test: torch.Tensor) -> float:
    """Signal to quantization noise in dB, in float64; infinite where both are equal."""
    noise = (reference.double() - test.double()).square().sum().item()
    return math.inf if not noise else 10 * math.log10(reference.double().square().sum().item() / noise)


def psnr_db(reference: torch.Tensor, test: torch.Tensor) -> float:
    """Peak signal to noise of images in dB; the peak is the reference's range."""
    noise = (reference.double() - test.double()).square().mean().item()
    peak = (reference.max() - reference.min()).double().item()
    return math.inf if not noise else 10 * math.log10(peak**2 / noise)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """The cosine of the angle between two tensors, in float64."""
    return torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


def files(folder: Path) -> set[str]:
    """Every file below `folder`, as a path relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else set()


def qvd(result: Result, node: str) -> dict[str, object]:
    """What one of our nodes says about itself in the front end."""
    return dict(result.outputs[node]["qvd"][0])
