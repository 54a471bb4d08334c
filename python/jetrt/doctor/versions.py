"""Comparing versions that are known to different depths."""

from __future__ import annotations

import re

__all__ = ["differ", "numbers"]


def numbers(version: str | None) -> tuple[int, ...]:
    """(10, 3, 0, 30) of "10.3.0.30-1+cuda12.5" and "10.3.0.30.post1"; empty for what is unknown."""
    match = re.match(r"\d+(\.\d+)*", version or "", re.ASCII)
    return tuple(map(int, match[0].split("."))) if match else ()


def differ(one: str | None, other: str | None, depth: int = 3) -> bool:
    """Do they differ in what both of them say, of the first `depth` numbers? What is unknown does not."""
    a, b = numbers(one), numbers(other)
    shared = min(len(a), len(b), depth)
    return a[:shared] != b[:shared]
