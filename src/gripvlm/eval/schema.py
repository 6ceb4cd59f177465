"""The format of a results file: its published JSON schema, and the check against it."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from gripvlm.errors import GripError
from gripvlm.utils.strict_json import BadJSON

__all__ = ["SCHEMA", "ResultsError", "checked_record", "checked_result", "is_result", "published", "violations"]

SCHEMA = "gripvlm.evaluate/1"
_KIND, _VERSION = "gripvlm.evaluate", 1
_SHOWN = 3
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_NUMBER = (int, float)
_ANSWER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "pruner", "keep", "id", "image_id", "prediction"), (str,)),
    **dict.fromkeys(("score", "k"), _NUMBER),
    "n": (int,),
    "seconds": (dict,),
}
"""What a line of a samples file must have."""
_SECONDS = {"vision", "pruner", "overhead", "prefill", "decode"}
_CHECKED = {"type", "required", "properties", "items", "minItems", "minLength", "const", "enum", "minimum", "maximum"}
_CHECKED |= {"exclusiveMinimum", "pattern", "$ref", "$defs", "$schema", "$id", "title", "description"}


class ResultsError(GripError):
    """A results file cannot be read, or is not what it should be."""


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """The schema as JSON (draft 2020-12), `src/gripvlm/evaluate/results.schema.json`."""
    return json.loads(files("gripvlm.eval").joinpath("results.schema.json").read_text(encoding="utf-8"))


def is_result(content: Any) -> bool:
    """Whether this is an evaluation's JSON, of any version."""
    return isinstance(content, dict) and str(content.get("schema", "")).partition("/")[0] == _KIND


def checked_result(content: Any, where: str) -> dict[str, Any]:
    """The content, known to be a whole results file of a version that is known here.

    Raises:
        ResultsError: it is something else, of a newer version, against the schema (up to three
            places are named), or holds a row twice.
    """
    if not is_result(content):
        raise ResultsError(f"{where} is no result of an evaluation: type a file that `gripvlm eval --out` wrote")
    version = re.fullmatch(rf"{re.escape(_KIND)}/(\d+)", content["schema"])
    if version is None:
        raise ResultsError(f"{where} has the schema {content['schema']!r}, expected {SCHEMA!r}: is it damaged?")
    if int(version[1]) > _VERSION:
        raise ResultsError(
            f"{where} was written by a newer gripvlm (schema {content['schema']}, this one reads up to {SCHEMA}): "
            "pip install --upgrade gripvlm"
        )
    wrong = list(violations(content, published()))
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ResultsError(
            f"{where} does not follow the schema {SCHEMA}: {'; '.join(wrong[:_SHOWN])}{more}. Run the evaluation "
            "again, or restore the file"
        )
    tasks, specs = content["header"]["tasks"], content["header"].get("task_specs")
    if specs is not None and len(specs) != len(tasks):
        raise ResultsError(
            f"{where}: header.task_specs has {len(specs)} entries for {len(tasks)} tasks: restore the file"
        )
    for part in ("rows", "means"):
        seen: set[tuple[str, str, str]] = set()
        for row in content[part]:
            key = row["task"], row["pruner"], str(row["keep"])
            if key in seen:
                raise ResultsError(
                    f"{where} holds a row twice in {part!r}: task {key[0]}, pruner {key[1]}, keep {key[2]}. Remove one "
                    "of them, or run the evaluation again"
                )
            seen.add(key)
    return content


def checked_record(row: Any) -> dict[str, Any]:
    """The line of a samples file, known to be an answer that can be counted and drawn.

    Raises:
        BadJSON: it is not; with the first thing that is wrong.
    """
    try:
        wrong = next((name for name, kinds in _ANSWER.items() if not _fits(row[name], kinds)), "")
        if not wrong and not all(_fits(row["seconds"][name], _NUMBER) for name in row["seconds"].keys() | _SECONDS):
            wrong = "seconds"
        elif not wrong and not all(_drawable(item) for item in row.get("kept", ())):
            wrong = "kept"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadJSON(f"is no answer ({type(error).__name__}: {error})") from None
    if wrong:
        raise BadJSON(f"says that {wrong} is {_said(row[wrong])}")
    return row


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and (type(value) is not float or math.isfinite(value))


def _drawable(item: Any) -> bool:
    """Whether one of the masks in `kept` has its n bits, and a raster or none."""
    n, grid = item["n"], item["grid"]
    raster = grid is None or (len(grid) == 2 and all(type(side) is int and side > 0 for side in grid))
    return raster and type(n) is int and 0 < n <= 8 * len(base64.b64decode(item["mask"], validate=True))


def violations(value: Any, schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What in `value` is against the schema, one line each; the part of JSON Schema that ours uses.

    Raises:
        ValueError: the schema uses a keyword that is not checked here.
    """
    if unknown := schema.keys() - _CHECKED:
        raise ValueError(f"keywords {sorted(unknown)} of a schema are not checked here")
    if "$ref" in schema:
        yield from violations(value, published()["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
        return
    place = where or "the file"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{place} is {_said(value)}, expected {' or '.join(kinds)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{place} is {_said(value)}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {_said(value)}, expected one of {', '.join(schema['enum'])}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _bounds(value, schema, place)
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        yield f"{place} is empty"
    if isinstance(value, str) and re.search(schema.get("pattern", ""), value) is None:
        yield f"{place} is {_said(value)}, expected the pattern {schema['pattern']}"
    if isinstance(value, dict):
        yield from (f"{place} has no {name!r}" for name in schema.get("required", ()) if name not in value)
        for name, part in schema.get("properties", {}).items():
            if name in value:
                yield from violations(value[name], part, f"{where}.{name}" if where else name)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{place} is empty"
        for number, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{where}[{number}]")


def _bounds(value: float, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    if not math.isfinite(value):
        yield f"{place} is {value}, expected a finite number"
    elif value < schema.get("minimum", value) or value > schema.get("maximum", value):
        yield f"{place} is {value}, expected {schema.get('minimum', '')} to {schema.get('maximum', 'any number')}"
    elif "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{place} is {value}, expected more than {schema['exclusiveMinimum']}"


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
