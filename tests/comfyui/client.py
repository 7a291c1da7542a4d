"""Talks to a ComfyUI server as its front end does: submits a prompt, follows the websocket, reads what came out."""

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .websocket import WebSocket

Prompt = dict[str, dict[str, Any]]
ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


class Rejected(RuntimeError):
    """The server refused the prompt; `error` is its own account, `node_errors` that of each node."""

    def __init__(self, error: dict[str, Any], node_errors: dict[str, Any]) -> None:
        self.error = error
        self.node_errors = node_errors
        super().__init__(self.text)

    @property
    def text(self) -> str:
        """Every message in one text."""
        parts = [f"{self.error.get('message', '')} {self.error.get('details', '')}"]
        for node in self.node_errors.values():
            parts += [f"{item.get('message', '')} {item.get('details', '')}" for item in node.get("errors", [])]
        return " | ".join(parts)


@dataclass
class Result:
    """How a prompt went: its end, the messages in order, and what the nodes gave to the front end."""

    prompt_id: str
    status: Literal["success", "error", "interrupted"]
    seconds: float
    messages: list[tuple[str, dict[str, Any]]]
    node_errors: dict[str, Any] = field(default_factory=dict)  # of a prompt that ran in part

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of every message of that type."""
        return [data for name, data in self.messages if name == kind]

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """`ui` of each node that sent one, by node id."""
        return {data["node"]: data["output"] or {} for data in self.of("executed")}

    @property
    def cached(self) -> set[str]:
        """The nodes that ComfyUI did not run again."""
        return {node for data in self.of("execution_cached") for node in data["nodes"]}

    @property
    def executed(self) -> list[str]:
        """The nodes that ran, in order."""
        return [data["node"] for data in self.of("executing") if data.get("node")]

    @property
    def error(self) -> str:
        """The message on the node that failed, or an empty text."""
        return "".join(str(data["exception_message"]).strip() for data in self.of("execution_error"))

    @property
    def traceback(self) -> str:
        """Where the node failed, as its server tells."""
        return "".join(line for data in self.of("execution_error") for line in data.get("traceback", []))

    @property
    def failed_node(self) -> str:
        """The id of the node that failed, or an empty text."""
        return "".join(str(data["node_id"]) for data in self.of("execution_error"))


class Client:
    """One client of the server at `url`, with a client id of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as response:
            return json.loads(response.read())

    def post(self, path: str, data: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON (None where there is none) of a POST."""
        body = json.dumps(data).encode()
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        """Every node class the server knows."""
        return dict(self.get("/object_info"))

    def interrupt(self) -> None:
        """Stop what runs now."""
        self.post("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = False) -> None:
        """Ask the server to unload its models, and with `free_memory` to forget its cached outputs too."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def run(
        self,
        prompt: Prompt,
        *,
        timeout: float = 300.0,
        on_message: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> Result:
        """Submit `prompt` and follow it to its end; `Rejected` where the server refuses it.

        Every node gets a `_meta`: ComfyUI's node replacement fails without.
        """
        whole = {key: {"_meta": {"title": node["class_type"]}, **node} for key, node in prompt.items()}
        connection = WebSocket(f"{self.url}/ws?clientId={self.id}")
        try:
            began = time.monotonic()
            status, answer = self.post("/prompt", {"prompt": whole, "client_id": self.id})
            if status != 200:
                answer = answer or {}
                raise Rejected(answer.get("error", {"message": f"HTTP {status}"}), answer.get("node_errors", {}))
            prompt_id = answer["prompt_id"]
            messages: list[tuple[str, dict[str, Any]]] = []
            while True:
                left = timeout - (time.monotonic() - began)
                if left <= 0:
                    raise TimeoutError(f"prompt {prompt_id} did not end within {timeout:.0f} s")
                received = connection.receive(left)
                if isinstance(received, bytes):
                    messages.append(("binary", {"bytes": len(received)}))
                    continue
                message = json.loads(received)
                kind, data = message["type"], message.get("data") or {}
                # Messages of custom nodes name no prompt; those of another prompt are not ours.
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                messages.append((kind, data))
                if on_message is not None:
                    on_message(kind, data)
                if kind in ENDS:
                    seconds = time.monotonic() - began
                    return Result(prompt_id, ENDS[kind], seconds, messages, answer.get("node_errors") or {})  # type: ignore[arg-type]
        finally:
            connection.close()
