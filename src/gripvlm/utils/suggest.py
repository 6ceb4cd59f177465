"""Names that are close to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean 'grid' or 'grip'? `, to be followed by more text; "" where nothing in `known` is close."""
    matches = get_close_matches(name, list(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, matches))}? " if matches else ""
