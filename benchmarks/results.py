"""What was measured: one entry per row, in a JSON file that is written after every row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1

Key = tuple[str, str, str, int, int]


@dataclass(frozen=True)
class Entry:
    """One measured row.

    model, bits, name, clips, seed: its key. prompts: how many of the clips count for PSNR and SSIM.
    figures: numbers by name (`tables.COLUMNS`); None for infinity and for what could not be measured.
    comparable: computes with exactly `bits` in every layer that QVD quantizes, so that it may be called the best.
    error: why there are no figures. seconds: that quantizing and sampling took. versions: of what computed it.
    """

    model: str
    bits: str
    name: str
    clips: int
    seed: int
    kind: str
    granularity: str
    prompts: int
    figures: dict[str, float | None] = field(default_factory=dict)
    comparable: bool = True
    note: str = ""
    error: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.model, self.bits, self.name, self.clips, self.seed

    @property
    def finished(self) -> bool:
        """Whether it need not be tried again: a failed row is, in another environment it may succeed."""
        return not self.error


class Store:
    """Entries by key, in one JSON file. Every `put` writes the file anew: a killed run loses no finished row."""

    def __init__(self, path: Path):
        self.path = path
        self.entries = {entry.key: entry for entry in read_entries(path)} if path.exists() else {}

    def finished(self, key: Key) -> bool:
        entry = self.entries.get(key)
        return entry is not None and entry.finished

    def put(self, entry: Entry) -> None:
        """Add or replace; a failure never replaces figures."""
        if entry.error and self.finished(entry.key):
            return
        self.entries[entry.key] = entry
        write_entries(self.path, self.entries.values())


def read_entries(path: Path) -> list[Entry]:
    """Entries of a file of `write_entries`. Raises ValueError for any other file."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return [Entry(**values) for values in content["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of this benchmark ({error}): move it away.") from error


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write atomically: a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"format": FORMAT, "entries": [asdict(entry) for entry in entries]}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def merge(files: Sequence[Path]) -> list[Entry]:
    """The entries of several files. Of two with one key the later file's counts, but a failure never hides figures."""
    merged: dict[Key, Entry] = {}
    for path in files:
        for entry in read_entries(path):
            known = merged.get(entry.key)
            if known is None or not known.finished or entry.finished:
                merged[entry.key] = entry
    return list(merged.values())
