"""The server: `send_sync` writes down what would go to the browser, `routes` what would be served.

There is none until a test makes one; scripts that import ComfyUI have none either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class _Routes:
    """aiohttp's table of routes, as far as handlers are put into it."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[str, str], Callable[..., Any]] = {}

    def get(self, path: str, **_: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self._put("GET", path)

    def post(self, path: str, **_: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return self._put("POST", path)

    def _put(self, method: str, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
            self.handlers[method, path] = handler
            return handler

        return decorate


class PromptServer:
    """`instance` is the running one; ComfyUI's takes its event loop."""

    instance: ClassVar[PromptServer]

    def __init__(self, loop: Any) -> None:
        PromptServer.instance = self
        self.client_id: str | None = None
        self.routes = _Routes()
        self._sent: list[tuple[str, dict[str, Any], str | None]] = []

    def send_sync(self, event: str, data: dict[str, Any], sid: str | None = None) -> None:
        self._sent.append((event, data, sid))
