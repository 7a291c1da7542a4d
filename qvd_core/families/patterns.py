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


def has_prefix(name: str, prefixes: Iterable[str]) -> bool:
    """Whether `name` equals one of the prefixes or lies below it ("blocks.1" holds "blocks.1.ffn", not "blocks.10")."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
