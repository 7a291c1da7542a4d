"""The committed table of tile sizes: which blocks, warps and stages a kernel is launched with.

A table instead of tuning at run time: the first step is not slow, and a result does not depend on what else the GPU did
while it was measured. `python -m qvd_core.ops.triton.tune` measures and rewrites it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from qvd_core.errors import QVDError

TABLE = Path(__file__).with_name("tiles.json")
VERSION = 1
KINDS = ("linear", "linear_packed", "conv", "weight_only")
# Compute capabilities that share tiles, and the bytes of shared memory a program may use there.
SHARED_MEMORY = {"sm80": 166912, "sm89": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376}
LIMITS = {
    "block_m": (16, 256),
    "block_n": (16, 256),
    "block_k": (32, 256),
    "warps": (1, 16),
    "stages": (1, 8),
    "group_m": (1, 64),
}


@dataclass(frozen=True)
class Tile:
    """One rule: the launch of shapes up to max_m x max_n x max_k (0: any); the first rule that fits is taken."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    max_m: int = 0
    max_n: int = 0
    max_k: int = 0

    def fits(self, m: int, n: int, k: int) -> bool:
        """Whether the rule is for an [m, k] x [k, n] product; of a convolution k counts the channels alone."""
        return all(not most or size <= most for size, most in ((m, self.max_m), (n, self.max_n), (k, self.max_k)))

    def to_dict(self) -> dict[str, int]:
        """The entry of the JSON file: limits of 0 are left out."""
        return {name: value for name, value in asdict(self).items() if value or not name.startswith("max_")}


Tiles = dict[str, dict[str, list[Tile]]]  # architecture -> kind -> rules


def architecture(capability: int) -> str:
    """The class of GPUs that `capability` (89 for sm_89) belongs to."""
    for name, first in (("sm120", 120), ("sm100", 100), ("sm90", 90), ("sm89", 86)):
        if capability >= first:
            return name
    return "sm80"


def find_tile(kind: str, capability: int, m: int, n: int, k: int) -> Tile:
    """The tile for an [m, k] x [k, n] product of `kind` (one of KINDS)."""
    return next(tile for tile in tiles()[architecture(capability)][kind] if tile.fits(m, n, k))


@cache
def tiles() -> Tiles:
    """The committed table."""
    return read_tiles(TABLE)


def read_tiles(path: Path) -> Tiles:
    """Read and check a table. Raises QVDError for anything that could not be launched, naming the entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QVDError(f"the tile table {path} cannot be read ({error}): reinstall or run the tuner again.") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise QVDError(f"the tile table {path} is not of version {VERSION}: reinstall or run the tuner again.")
    table = content.get("tiles")
    return {
        name: {kind: _rules(path, f"{name}.{kind}", _entry(path, table, name, kind)) for kind in KINDS}
        for name in SHARED_MEMORY
    }


def _entry(path: Path, table: Any, name: str, kind: str) -> list[Any]:
    entry = table.get(name) if isinstance(table, dict) else None
    rules = entry.get(kind) if isinstance(entry, dict) else None
    if not isinstance(rules, list) or not rules:
        raise QVDError(f"the tile table {path} has no rules for {name}.{kind}: reinstall or run the tuner again.")
    return rules


def _rules(path: Path, where: str, entries: list[Any]) -> list[Tile]:
    rules = [_tile(path, f"{where}[{index}]", entry) for index, entry in enumerate(entries)]
    last = rules[-1]
    if last.max_m or last.max_n or last.max_k:
        raise QVDError(f"the tile table {path}: the last rule of {where} must fit every shape.")
    return rules


def _tile(path: Path, where: str, entry: Any) -> Tile:
    known = {field.name for field in fields(Tile)}
    if not isinstance(entry, dict) or not set(entry) <= known or not set(LIMITS) <= set(entry):
        raise QVDError(
            f"the tile table {path}: {where} must name {', '.join(LIMITS)}, and max_m, max_n, max_k at will."
        )
    for key, value in entry.items():
        low, high = LIMITS.get(key, (0, 2**31 - 1))
        whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        if not whole or (key.startswith(("block", "warps")) and value & (value - 1)):
            kind = "a power of two" if key.startswith(("block", "warps")) else "a number"
            raise QVDError(f"the tile table {path}: {where}.{key} must be {kind} from {low} to {high}, got {value!r}.")
    return Tile(**entry)


def write_tiles(path: Path, table: Tiles, note: str) -> None:
    """Write a table, one rule per line, with a note on where its numbers come from."""
    lines = [f'{{"version": {VERSION},', f' "note": {json.dumps(note)},', ' "tiles": {']
    for name, kinds in table.items():
        lines.append(f'  "{name}": {{')
        for kind, rules in kinds.items():
            body = ",\n".join(f"     {json.dumps(rule.to_dict())}" for rule in rules)
            lines.append(f'   "{kind}": [\n{body}\n   ]' + ("" if kind == list(kinds)[-1] else ","))
        lines.append("  }" + ("" if name == list(table)[-1] else ","))
    lines.append(" }\n}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
