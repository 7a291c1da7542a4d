"""What was measured of the kernels: one entry per shape and row, in one JSON file per machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernel_shapes import Shape

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One row on one shape.

    model, layer_kind: of the shape; kind: of the row. figures: numbers by name (`kernel_tables.COLUMNS`), None for
    what could not be measured. exact: whether the arithmetic is right; judged_by: "bits" where the integer sums were
    compared bit by bit, "sqnr" where only the output could be judged, "" for floating point.
    error: why there are no figures. versions: of what computed it.
    """

    shape: str
    row: str
    model: str
    layer_kind: str
    kind: str
    figures: dict[str, float | None] = field(default_factory=dict)
    exact: bool | None = None
    judged_by: str = ""
    note: str = ""
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.shape, self.row

    @property
    def finished(self) -> bool:
        """Whether it need not be tried again: a failed row is, in another environment it may succeed."""
        return not self.error


class Store:
    """Entries by key in the JSON file of one machine. `put` writes the file anew: a killed run loses one shape only."""

    def __init__(self, path: Path, machine: dict[str, str]):
        self.path, self.machine = path, machine
        self.entries: dict[tuple[str, str], Entry] = {}
        if path.exists():
            known, entries = read(path)
            self.entries = {entry.key: entry for entry in entries}
            self.machine = known | machine

    def finished(self, shape: Shape, row: str) -> bool:
        entry = self.entries.get((shape.name, row))
        return entry is not None and entry.finished

    def put(self, entries: Iterable[Entry]) -> None:
        """Add or replace; a failure never replaces figures."""
        for entry in entries:
            known = self.entries.get(entry.key)
            if not entry.error or known is None or not known.finished:
                self.entries[entry.key] = entry
        write(self.path, self.machine, list(self.entries.values()))


def read(path: Path) -> tuple[dict[str, str], list[Entry]]:
    """The machine and the entries of a file of `write`. Raises ValueError for any other file."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return dict(content["machine"]), [Entry(**values) for values in content["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of the kernel benchmark ({error}): move it away.") from error


def write(path: Path, machine: dict[str, str], entries: Sequence[Entry]) -> None:
    """Write atomically: a reader finds the old file or the new one, never half of one."""
    write_json(path, {"format": FORMAT, "machine": machine, "entries": [asdict(entry) for entry in entries]})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Any JSON, through a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)
