"""Where a layer is in its model: in which of the repeated blocks, and as what part of it, read from the names alone."""

from __future__ import annotations

from collections.abc import Iterable

Place = tuple[str, str]

_WAY_DOWN, _WAY_UP = ("down", "input"), ("up", "output")


def places(names: Iterable[str]) -> dict[str, Place]:
    """Layer name -> (block, part): "blocks.3.attn1.to_q" is part "attn1.to_q" of block "blocks.3".

    A number with something below it counts blocks. The first word and its number name the block; where the number comes
    later, the word alone does ("mid_block"); without one, the block is "". In the part, numbers that count are left
    out, and so are words for blocks inside blocks: "attentions.1.transformer_blocks.0.attn1.to_q" is
    "attentions.attn1.to_q", the same part as of the attention before.
    """
    split = {name: name.split(".") for name in names}
    prefix = _common_prefix(list(split.values()))
    return {name: _place(parts[prefix:]) for name, parts in split.items()}


def in_depth_order(blocks: Iterable[str]) -> list[str]:
    """The blocks by name and number; in a U-shaped model, what is neither down nor up lies between the two."""
    ordered = natural_order(dict.fromkeys(blocks))
    if any(block.startswith(_WAY_DOWN) for block in ordered) and any(block.startswith(_WAY_UP) for block in ordered):
        ordered.sort(key=lambda block: 0 if block.startswith(_WAY_DOWN) else 2 if block.startswith(_WAY_UP) else 1)
    return ordered


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted by name, numbers by their value: "blocks.2" comes before "blocks.10"."""
    return sorted(names, key=lambda name: [(len(part) if part.isdigit() else 0, part) for part in name.split(".")])


def _place(parts: list[str]) -> Place:
    counting = [index for index, part in enumerate(parts) if part.isdigit() and 0 < index < len(parts) - 1]
    if not counting:
        return "", ".".join(parts)
    length = 2 if counting[0] == 1 else 1
    part = [
        word
        for index, word in enumerate(parts)
        if index >= length
        and index not in counting
        and not (index > length and index + 1 in counting and word.endswith("blocks"))
    ]
    return ".".join(parts[:length]), ".".join(part)


def _common_prefix(names: list[list[str]]) -> int:
    """How many leading words all names share, such as "transformer"; a word that counts blocks is none of them."""
    length = 0
    while len(names) > 1 and all(
        len(parts) > length + 2 and parts[length] == names[0][length] and not parts[length + 1].isdigit()
        for parts in names
    ):
        length += 1
    return length
