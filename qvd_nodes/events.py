"""What a running calibration tells the browser: ComfyUI's progress bar, and messages for QVD's live panel."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qvd_nodes._comfy import PromptServer, utils

logger = logging.getLogger(__name__)

CALIBRATION = "qvd.calibration"
SHORTEST_INTERVAL = 0.2  # seconds between two messages


@dataclass
class CalibrationEvents:
    """The messages of one run of a calibration node.

    node: its id in the graph; empty where there is none. total: units of work for the progress bar.
    """

    node: str
    total: int
    expert: str = ""
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._bar = utils.ProgressBar(self.total, node_id=self.node or None)
        self._last = 0.0
        self._figures: list[tuple[str, float]] = []

    def step(self, prompt: int, prompts: int, step: int, steps: int, preview: Any = None) -> None:
        """One more step of one prompt is sampled; `preview` is a picture of it as ComfyUI's progress bar takes it."""
        self.done += 1
        self._bar.update_absolute(self.done, self.total, preview)
        self._send("sampling", prompt=prompt, prompts=prompts, step=step, steps=steps)

    def found(self, figures: Mapping[str, float]) -> None:
        """Output SQNR in dB of layers that are done; goes out with the next message."""
        self._figures += figures.items()

    def layer(self, name: str) -> None:
        """The search is at layer `name`."""
        self.done += 1
        self._bar.update_absolute(self.done, self.total)
        self._send("search", layer=name)

    def end(self, phase: str, message: str = "") -> None:
        """The run is "done", "cached", "interrupted" or "failed"; always sent."""
        if phase in ("done", "cached"):
            self.done = self.total
            self._bar.update_absolute(self.total, self.total)
        self._send(phase, urgent=True, message=message)

    def _send(self, phase: str, urgent: bool = False, **values: Any) -> None:
        now = time.monotonic()
        if not urgent and now - self._last < SHORTEST_INTERVAL:
            return
        self._last = now
        seconds = now - self.started
        left = seconds / self.done * (self.total - self.done) if self.done else None
        message = {
            "node": self.node,
            "expert": self.expert,
            "phase": phase,
            "done": self.done,
            "total": self.total,
            "seconds": round(seconds, 1),
            "eta": None if left is None else round(left, 1),
            "sqnr_db": [[name, round(decibels, 1)] for name, decibels in self._figures],
            "message": "",
            **values,
        }
        self._figures = []
        send(CALIBRATION, message)


def send(event: str, message: Mapping[str, Any]) -> None:
    """Send to the browser whose prompt is running; without a server (a test, a script) there is nobody to tell."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(event, dict(message), server.client_id)
