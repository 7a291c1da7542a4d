"""Pictures and frames as files that the front end can show."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvd_core.files import write_bytes
from qvd_nodes._comfy import folder_paths

SHOWN_FRAMES = 64  # of a long video, spread evenly
TEMPORARY = "temp"


def image_of(png: bytes) -> Tensor:
    """A PNG as ComfyUI's IMAGE, float32 [1, H, W, 3]."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float() / 255


def write_temporary(name: str, content: bytes, extension: str = "png") -> dict[str, str]:
    """Write to ComfyUI's folder for previews, which it empties when it starts; how the front end asks for the file."""
    filename = f"{name}_{uuid.uuid4().hex[:12]}.{extension}"
    write_bytes(Path(folder_paths.get_temp_directory()) / filename, content)
    return {"filename": filename, "subfolder": "", "type": TEMPORARY}


def saved_file(path: Path) -> dict[str, str]:
    """How the front end asks for a file in ComfyUI's output folder."""
    folder = os.path.relpath(path.parent, folder_paths.get_output_directory())
    return {"filename": path.name, "subfolder": "" if folder == "." else folder, "type": "output"}


def spread_frames(count: int) -> list[int]:
    """Indices of at most `SHOWN_FRAMES` of `count` frames, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().long().tolist()


def write_frames(name: str, video: Tensor, frames: list[int]) -> list[dict[str, Any]]:
    """Frames of a video [T, H, W, C] in [0, 1] as previews."""
    return [write_temporary(f"{name}_{index:04}", _png(video[index])) for index in frames]


def _png(frame: Tensor) -> bytes:
    from PIL import Image

    pixels = (frame[..., :3].float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()
    picture = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.numpy().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
