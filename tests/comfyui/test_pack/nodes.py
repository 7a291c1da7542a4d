"""Test nodes in ComfyUI's first node API, which every release loads."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import torch
from safetensors.torch import save_file


def seeded(text: str, *shape: int) -> torch.Tensor:
    """Normal numbers, float32, that depend on `text` and the shape alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class QVDTestConditioning:
    """What a text encoder would give: [1, tokens, width], and a pooled [1, pooled_width] where that is not 0."""

    CATEGORY = "QVD/test"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text": ("STRING", {"multiline": True, "default": ""}),
                "width": ("INT", {"default": 4096, "min": 1, "max": 65536}),
                "tokens": ("INT", {"default": 12, "min": 0, "max": 4096}),
                "pooled_width": ("INT", {"default": 0, "min": 0, "max": 65536}),
                "masked": ("BOOLEAN", {"default": False}),
            }
        }

    def make(self, text: str, width: int, tokens: int, pooled_width: int, masked: bool) -> tuple[list[Any]]:
        """A conditioning without entries where `tokens` is 0; with a mask of ones where `masked` is set (LTX-Video)."""
        if not tokens:
            return ([],)
        extra = {"pooled_output": seeded("pooled " + text, 1, pooled_width)} if pooled_width else {}
        if masked:
            extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        return ([[seeded(text, 1, tokens, width), extra]],)


class QVDTestClipVision:
    """A CLIP_VISION whose embedding of an image depends on the image's mean colour."""

    CATEGORY = "QVD/test"
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"width": ("INT", {"default": 1024, "min": 1, "max": 65536})}}

    def make(self, width: int) -> tuple[Any]:
        def encode_image(image: torch.Tensor, crop: Any = True) -> SimpleNamespace:
            mean = image.float().mean(dim=(0, 1, 2))
            return SimpleNamespace(image_embeds=seeded("image", 1, width) + mean.sum() * seeded("mean", 1, width))

        return (SimpleNamespace(encode_image=encode_image),)


class QVDTestImage:
    """Smooth colours [frames, height, width, 3] in 0..1, without a file."""

    CATEGORY = "QVD/test"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 64, "min": 1, "max": 4096}
        return {
            "required": {
                "width": ("INT", size),
                "height": ("INT", size),
                "frames": ("INT", {"default": 1, "min": 1, "max": 256}),
                "noise": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}),
            }
        }

    def make(self, width: int, height: int, frames: int, noise: float) -> tuple[torch.Tensor]:
        time = torch.arange(frames).view(-1, 1, 1, 1)
        down, right = torch.linspace(0, 3, height).view(1, -1, 1, 1), torch.linspace(0, 2, width).view(1, 1, -1, 1)
        image = 0.5 + 0.4 * torch.sin(down + right * torch.tensor([1.0, 2.0, 3.0]) + 0.3 * time)
        return ((image + noise * seeded("noise", *image.shape)).clamp(0, 1),)


class QVDTestSaveLatent:
    """Writes a LATENT as it is to `output/<name>.safetensors`."""

    CATEGORY = "QVD/test"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    VALUE = "LATENT"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (cls.VALUE,), "name": ("STRING", {"default": "value"})}}

    def save(self, value: Any, name: str) -> dict[str, Any]:
        tensor = value["samples"] if isinstance(value, dict) else value
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"value": tensor.detach().float().cpu().contiguous().clone()}, str(path))
        return {"ui": {"text": [f"{tuple(tensor.shape)}"]}}


class QVDTestSaveImages(QVDTestSaveLatent):
    """Writes an IMAGE as it is to `output/<name>.safetensors`."""

    VALUE = "IMAGE"


class QVDTestModelHash:
    """SHA-256 over every weight of a MODEL: names, shapes, types and bytes. `after` only sets the order."""

    CATEGORY = "QVD/test"
    RETURN_TYPES = ()
    FUNCTION = "hash"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        # `again` differs in each prompt: a hash from ComfyUI's cache would show nothing.
        return {
            "required": {"model": ("MODEL",), "again": ("STRING", {"default": ""})},
            "optional": {"after": ("LATENT",)},
        }

    def hash(self, model: Any, again: str, after: Any = None) -> dict[str, Any]:
        digest = hashlib.sha256()
        state = model.model.diffusion_model.state_dict()
        for name in sorted(state):
            tensor = state[name]
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        classes: dict[str, int] = {}
        for module in model.model.diffusion_model.modules():
            classes[type(module).__qualname__] = classes.get(type(module).__qualname__, 0) + 1
        hooks = sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.model.diffusion_model.modules()
        )
        return {"ui": {"text": [digest.hexdigest()], "classes": [classes], "hooks": [hooks]}}


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        QVDTestConditioning,
        QVDTestClipVision,
        QVDTestImage,
        QVDTestSaveLatent,
        QVDTestSaveImages,
        QVDTestModelHash,
    )
}
