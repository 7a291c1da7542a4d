"""A real ComfyUI server with QVD, tiny models and a prompt that uses every node with a view of its own.

`python -m tests.web.serve` prints one line of JSON, {"url", "prompt"}, and stops the server when its input ends.
`COMFYUI_PATH` names the checkout, as for the tests in `tests/comfyui`.
"""

import json
import os
import subprocess
import sys
from typing import Any

from tests.comfyui.client import Client, Prompt
from tests.comfyui.graphs import Graph
from tests.comfyui.server import TEST_PACK, Server, comfyui_path

PROMPTS = ("a fox in the snow", "a river at night")


def default_inputs(node_info: dict[str, Any]) -> dict[str, Any]:
    """The value that each required widget of a node starts with."""
    values = {}
    for name, (kind, *options) in node_info["input"]["required"].items():
        settings = options[0] if options else {}
        choices = kind if isinstance(kind, list) else settings.get("options", [])
        values[name] = settings.get("default", choices[0] if choices else "")
    return values


def prompt(object_info: dict[str, Any]) -> Prompt:
    """Settings, calibration, quantization, report, and the comparison of float and int8 frames."""
    graph = Graph()
    float_model = graph.model("wan")
    settings = graph.add("QVDQuantizeSettings", **default_inputs(object_info["QVDQuantizeSettings"]))
    scales = graph.calibrate(float_model, "wan", *PROMPTS, steps=6, settings=settings)
    int8_model = graph.quantize(float_model, scales=scales, settings=settings)
    graph.add("QVDReport", model=int8_model, scales=scales, filename_prefix="qvd_report")
    frames = [graph.decode(graph.sample(model, "wan"), "wan") for model in (float_model, int8_model)]
    graph.add("QVDCompare", reference=frames[0], test=frames[1], amplify=8.0)
    return graph.prompt


def main() -> int:
    """Serve until the input ends."""
    path = comfyui_path()
    if path is None:
        print("COMFYUI_PATH is not set", file=sys.stderr)
        return 2
    server = Server(path)
    server.prepare()
    script = TEST_PACK.parent / "tiny_files.py"
    subprocess.run(
        [server.python, str(script), str(path), str(server.base / "models")],
        check=True,
        stdout=sys.stderr,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with server:
        print(json.dumps({"url": server.url, "prompt": prompt(Client(server.url).object_info())}), flush=True)
        sys.stdin.read()
        if "Traceback" in server.log:
            print(server.tail(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
