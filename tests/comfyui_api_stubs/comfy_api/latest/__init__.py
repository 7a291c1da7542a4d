"""ComfyUI's node API, third version."""

from __future__ import annotations

from abc import ABC, abstractmethod

from comfy_api.latest import _io as io
from comfy_api.latest import _ui as ui

__all__ = ["ComfyExtension", "io", "ui"]


class ComfyExtension(ABC):
    """What a pack's `comfy_entrypoint` returns."""

    async def on_load(self) -> None:
        return None

    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]: ...
