"""Layer-name patterns, anchored on whole name parts.

`*` stands for exactly one part of a dotted name, `**` for any number of parts (also none).
"blocks.*.attn1.to_q" matches "blocks.7.attn1.to_q" and nothing longer or shorter, so that "proj_out" never
catches "single_blocks.3.proj_out" by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression a pattern stands for; to be used with `fullmatch`."""
    expression = ""
    for part in pattern.split("."):
        if part == "**":
            expression += r"(?:[^.]+\.)*"
        elif part == "*":
            expression += r"[^.]+\."
        else:
            expression += re.escape(part) + r"\."
    return re.compile(expression)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the dotted `name` matches any of the patterns."""
    return any(compile_pattern(pattern).fullmatch(name + ".") for pattern in patterns)


def has_parts(name: str, wanted: Iterable[str]) -> bool:
    """Whether some whole parts of `name`, one after the other, are one of `wanted`.

    "blocks.1" is in "blocks.1.ffn" and not in "blocks.10"; "to_k" is in every "blocks.*.attn1.to_k".
    """
    return any(f".{parts}." in f".{name}." for parts in wanted)
