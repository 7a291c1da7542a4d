"""The API twins of the example workflows, made to run on the tiny models of `tiny_files.py`."""

import copy
import json
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]
FOLDER = Path(__file__).resolve().parent / "workflows"

FILES = {
    "wan2.1_t2v_1.3B_fp16.safetensors": "tiny_wan.safetensors",
    "wan2.2_t2v_high_noise_14B_fp16.safetensors": "tiny_wan.safetensors",
    "wan2.2_t2v_low_noise_14B_fp16.safetensors": "tiny_wan_low.safetensors",
    "wan_2.1_vae.safetensors": "tiny_wan_vae.safetensors",
    "hunyuan_video_t2v_720p_bf16.safetensors": "tiny_hunyuan_video.safetensors",
    "hunyuan_video_vae_bf16.safetensors": "tiny_hunyuan_vae.safetensors",
    "svd_xt.safetensors": "tiny_svd.safetensors",
}
LARGEST = {
    "width": 96, "height": 96, "length": 9, "video_frames": 4, "steps": 4, "switch_step": 2, "start_at_step": 2,
    "end_at_step": 2,
}  # fmt: skip
TO_THE_END = 10000  # `end_at_step` of a last sampler
# What a text encoder of that type gives: channels per token, pooled channels.
TEXTS = {"wan": (4096, 0), "hunyuan_video": (192, 768)}


def names() -> list[str]:
    """The example workflows, without endings."""
    return sorted(path.name.removesuffix(".api.json") for path in FOLDER.glob("*.api.json"))


def load(name: str) -> Prompt:
    """The twin as it is on disk."""
    return dict(json.loads((FOLDER / f"{name}.api.json").read_text()))


def for_tiny_models(prompt: Prompt, *, muted: bool = False) -> Prompt:
    """The same graph for the test server. What changes, and nothing else:

    1. Files: the real names become those of `FILES`.
    2. Sizes: widgets named in `LARGEST` are at most that large (an `end_at_step` of 10000 stays: it means the end).
    3. Text encoders have one large size in ComfyUI: every CLIPTextEncode becomes a QVDTestConditioning of the same
       text and of the width its loader's type stands for, and the loaders go.
    4. So do image encoders: a `clip_vision` input comes from a QVDTestClipVision.
    5. Muted nodes go, unless `muted` is set: then they run, as after Ctrl+M.
    """
    result: Prompt = {
        key: node for key, node in copy.deepcopy(prompt).items() if muted or not node["_meta"].get("muted")
    }
    loaders = {key: node["inputs"] for key, node in result.items() if node["class_type"].endswith("CLIPLoader")}
    for key, node in list(result.items()):
        inputs = node["inputs"]
        if node["class_type"] == "CLIPTextEncode":
            width, pooled = TEXTS[loaders[inputs["clip"][0]]["type"]]
            inputs = {"text": inputs["text"], "width": width, "tokens": 12, "pooled_width": pooled, "masked": False}
            result[key] = {**node, "class_type": "QVDTestConditioning", "inputs": inputs}
            continue
        for name, value in inputs.items():
            if isinstance(value, str):
                inputs[name] = FILES.get(value, value)
            elif name in LARGEST and not isinstance(value, list) and value != TO_THE_END:
                inputs[name] = min(value, LARGEST[name])
        if "clip_vision" in inputs:
            result["clip_vision"] = {
                "class_type": "QVDTestClipVision",
                "inputs": {"width": 1024},
                "_meta": {"title": "Test"},
            }
            inputs["clip_vision"] = ["clip_vision", 0]
    return {key: node for key, node in result.items() if key not in loaders}


def find(prompt: Prompt, class_type: str, title: str = "") -> str:
    """The id of the only node of that type (and of that title, where several are)."""
    keys = [key for key, node in prompt.items() if node["class_type"] == class_type]
    if title:
        keys = [key for key in keys if prompt[key]["_meta"]["title"] == title]
    if len(keys) != 1:
        raise LookupError(f"{len(keys)} nodes of type {class_type!r} and title {title!r}, not one")
    return keys[0]
