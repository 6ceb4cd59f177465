"""JSON that anybody may have written: what comes back is shallow, within a float's range, and can be written again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gripvlm.utils.disk import read_bytes

__all__ = ["DEEPEST", "BadJSON", "parse", "read"]

DEEPEST = 100
"""Lists and objects inside each other."""
_DIGITS = 300
"""Of a whole number; longer integers do not fit in a float."""
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_BEGUN = re.compile(r"-?[0-9]+(\.|(\.[0-9]+)?[eE][+-]?)")
"""A number whose fraction or exponent is still to come."""
_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{0,4}\Z")
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
        where = f"at line {error.lineno} column {error.colno}"
        raise BadJSON("is cut off" if _is_cut(error) else f"is no JSON: {error.msg} {where}") from None
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


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text, which is no JSON, could go on to be some."""
    text = error.doc.rstrip()
    rest = text[error.pos :]
    if not rest or error.msg.startswith("Unterminated string"):
        return True
    if error.msg == "Expecting value":
        return any(word.startswith(rest) for word in _WORDS)  # none is whole: whole words are no error
    if error.msg.startswith("Invalid \\uXXXX escape"):
        escape = _ESCAPE.search(text)
        return escape is not None and escape.start() <= error.pos
    start = len(text.rstrip("-+.0123456789eE"))  # the parser takes the digits of `-1.5e`, and stops at what follows
    return start < error.pos and _BEGUN.fullmatch(text, start) is not None


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
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, (list, dict))]
        if not level:
            return False
    return True
