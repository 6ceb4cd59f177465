"""JSON from anywhere: what `parse` returns is shallow, fits in floats, and can be written again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from gripvlm.utils.disk import read_bytes

__all__ = ["DEEPEST", "BadJSON", "parse", "read"]

DEEPEST = 100
"""Lists and objects inside each other."""
_MAX_DIGITS = 300
"""Of a whole number; longer integers do not fit in a float."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJSON(ValueError):
    """The text is not JSON that can be used. The message continues a file's name: "is cut off or no JSON: ..."."""


def read(path: str | Path) -> Any:
    """The JSON in a regular file.

    Raises:
        OSError: it cannot be read.
        BadJSON: as `parse`.
    """
    return parse(read_bytes(path))


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. NaN and Infinity by name are allowed, as Python writes them.

    Raises:
        BadJSON: it is cut off or no JSON, holds a number beyond a float's range or half of a surrogate pair, or is
            nested too deep.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=_integer, parse_float=_float)
    except UnicodeDecodeError as error:
        raise BadJSON(f"is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno} column {error.colno}"
        raise BadJSON(f"is cut off or no JSON: {error.msg} {where}") from None
    except RecursionError:
        raise BadJSON(f"is nested more than {DEEPEST} deep") from None
    # Counting brackets is cheap and rules out almost every file; those in strings count too, so it cannot decide.
    if text.count("[") + text.count("{") > DEEPEST and _too_deep(value, DEEPEST):
        raise BadJSON(f"is nested more than {DEEPEST} deep")
    # Python reads half of a pair without complaint, and fails only when it is written or printed.
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadJSON(f"holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}") from None
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise BadJSON(f"holds a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise BadJSON(f"holds {digits[:40]}, a number that is too large")
    return value


def _too_deep(value: Any, allowed: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    children = value.values() if isinstance(value, dict) else value
    return allowed == 0 or any(_too_deep(child, allowed - 1) for child in children)
