"""What ComfyUI's `/object_info` says of the nodes that the example workflows use, reduced to what a graph needs.

`object_info.json` is recorded from a real server by `python -m tests.comfyui.object_info`, without texts and without
the lists of files: names, types, order, ranges, and for our own nodes the choices. The same run writes the English
texts of our own nodes to `locales/en/nodeDefs.json`, the pattern for translations.
"""

import json
import sys
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parent / "object_info.json"
LOCALES = Path(__file__).resolve().parents[2] / "locales"
STOCK = (
    *("BasicGuider", "BasicScheduler", "CLIPLoader", "CLIPTextEncode", "CreateVideo", "DualCLIPLoader"),
    *("EmptyHunyuanLatentVideo", "FluxGuidance", "ImageOnlyCheckpointLoader", "KSampler", "KSamplerAdvanced"),
    *("KSamplerSelect", "LoadImage", "LoraLoaderModelOnly", "ModelSamplingSD3", "PreviewImage", "RandomNoise"),
    *("SVD_img2vid_Conditioning", "SamplerCustomAdvanced", "SaveVideo", "UNETLoader", "VAEDecode", "VAELoader"),
    "VideoLinearCFGGuidance",
)
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
AUTOGROW, DYNAMIC = "COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3"
KEPT = ("default", "min", "max", "step", "multiline", "image_upload", "control_after_generate")


def reduced(name: str, spec: list[Any], required: bool, own: bool) -> dict[str, dict[str, Any]]:
    """One input of `/object_info`, by the name that a prompt uses; a choice with inputs of its own gives several."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        kind, options = "COMBO", {"options": kind, **options}
    entry: dict[str, Any] = {"type": kind, "required": required}
    if kind == DYNAMIC:
        first = options["options"][0]
        entry |= {"type": "COMBO", "widget": True, "default": first["key"]}
        return {name: entry} | {
            f"{name}.{key}": value
            for part, inputs in first["inputs"].items()
            for inner, inner_spec in inputs.items()
            for key, value in reduced(inner, inner_spec, required and part == "required", own).items()
        }
    if kind == AUTOGROW:
        template = options["template"]
        grown = next(iter(next(part for part in template["input"].values() if part).values()))
        entry |= {"type": grown[0], "prefix": template["prefix"], "min": template["min"], "max": template["max"]}
        return {name: {**entry, "grows": True}}
    entry["widget"] = kind in WIDGETS and not options.get("forceInput", False)
    entry |= {key: options[key] for key in KEPT if key in options and not (key == "default" and options[key] is None)}
    # Files of this machine are no part of the record; the choices of our own nodes are a contract.
    if own and kind == "COMBO" and not name.endswith(("_name", "scheduler")):
        entry["options"] = list(options.get("options", []))
    return {name: entry}


def reduced_node(info: dict[str, Any], own: bool) -> dict[str, Any]:
    """One node of `/object_info`: its inputs in order, its outputs, and whether it is an output node."""
    inputs = {
        key: value
        for part in ("required", "optional")
        for name, spec in (info["input"].get(part) or {}).items()
        if not (len(spec) > 1 and spec[1].get("hidden"))
        for key, value in reduced(name, spec, part == "required", own).items()
    }
    outputs = [[str(name), str(kind)] for name, kind in zip(info["output_name"], info["output"], strict=True)]
    return {
        "display_name": info["display_name"],
        "inputs": inputs,
        "outputs": outputs,
        "output_node": info["output_node"],
    }


def reduce(object_info: dict[str, Any]) -> dict[str, Any]:
    """The recorded nodes out of a whole `/object_info`."""
    own = {name for name in object_info if name.startswith("QVD") and not name.startswith("QVDTest")}
    return {
        name: reduced_node(object_info[name], name in own) for name in sorted(own | (set(STOCK) & set(object_info)))
    }


def recorded() -> dict[str, Any]:
    """What was recorded."""
    return dict(json.loads(RECORDED.read_text()))


def write(nodes: dict[str, Any]) -> None:
    """Record `nodes`, one input a line."""
    lines = []
    for name, node in nodes.items():
        inputs = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in node["inputs"].items())
        rest = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in node.items() if key != "inputs")
        lines.append(f'{json.dumps(name)}: {{{rest}, "inputs": {{\n{inputs}}}}}')
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def own(object_info: dict[str, Any]) -> list[str]:
    """Our own nodes, without those of the tests."""
    return sorted(name for name in object_info if name.startswith("QVD") and not name.startswith("QVDTest"))


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """The texts of our own nodes as ComfyUI's front end looks translations up."""
    texts: dict[str, Any] = {}
    for name in own(object_info):
        info = object_info[name]
        inputs: dict[str, Any] = {}
        for part in ("required", "optional"):
            for key, spec in (info["input"].get(part) or {}).items():
                options = spec[1] if len(spec) > 1 else {}
                tooltip = {"tooltip": options["tooltip"]} if options.get("tooltip") else {}
                inputs[key] = {"name": options.get("display_name") or key, **tooltip}
        outputs = {str(slot): {"name": output} for slot, output in enumerate(info["output_name"])}
        texts[name] = {"display_name": info["display_name"], "description": info["description"], "inputs": inputs}
        texts[name] |= {"outputs": outputs} if outputs else {}
    return texts


def main() -> None:
    """Record from the checkout that `COMFYUI_PATH` names."""
    from tests.comfyui.client import Client
    from tests.comfyui.server import Server, comfyui_path

    path = comfyui_path()
    if path is None:
        sys.exit("set COMFYUI_PATH to a ComfyUI checkout")
    with Server(path) as server:
        object_info = Client(server.url).object_info()
        if not own(object_info):
            sys.exit(f"the pack did not load{server.tail()}")
    write(reduce(object_info))
    texts = json.dumps(english(object_info), indent=1, ensure_ascii=False)
    (LOCALES / "en" / "nodeDefs.json").write_text(texts + "\n")


if __name__ == "__main__":
    main()
