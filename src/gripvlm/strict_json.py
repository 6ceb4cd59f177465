"""JSON that anybody may have written: what comes back is finite, shallow and can be written again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gripvlm.disk import read_bytes

__all__ = ["DEEPEST", "BadJSON", "parse", "read"]

DEEPEST = 100
"""Lists and objects inside each other."""
_DIGITS = 300
"""Of a whole number: it still has a float beside it."""
_LITERAL = 4
"""What is left at most of a word such as `false` that is cut."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class BadJSON(ValueError):
    """The text is no JSON, or none that can be used; it says so as what follows a file's name: "is cut off"."""


def read(path: str | Path) -> Any:
    """The JSON in a regular file.

    Raises:
        OSError: it cannot be read.
        BadJSON: as `parse`.
    """
    return parse(read_bytes(path))


def parse(text: str | bytes) -> Any:
    """What the text says.

    Raises:
        BadJSON: it is cut off or no JSON, holds a number beyond a float's range or half of a surrogate pair, or is
            nested too deep. NaN and Infinity by name pass, as Python writes them.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=_whole, parse_float=_real)
    except UnicodeDecodeError as error:
        raise BadJSON(f"is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text.rstrip()) - _LITERAL and not error.msg.startswith("Extra data")
        cut = not text.strip() or ends or error.msg.startswith("Unterminated string")
        raise BadJSON("is cut off" if cut else f"is no JSON at line {error.lineno} ({error.msg})") from None
    except RecursionError:
        raise BadJSON(f"is nested more than {DEEPEST} deep") from None
    if text.count("[") + text.count("{") > DEEPEST and _deep(value):
        raise BadJSON(f"is nested more than {DEEPEST} deep")
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadJSON(f"holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}") from None
    return value


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise BadJSON(f"holds a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise BadJSON(f"holds {digits[:40]}, a number that is too large")
    return value


def _deep(value: Any) -> bool:
    """Whether lists and objects go deeper than `DEEPEST`; without calling itself, as it must not fail on them."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(DEEPEST):
        children = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in children if isinstance(child, (list, dict))]
        if not level:
            return False
    return True
