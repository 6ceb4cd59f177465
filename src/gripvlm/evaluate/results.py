"""Reading results files back: whole, of a version that is known, and with the answers that belong to them."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.evaluate.arms import BLIND
from gripvlm.evaluate.journal import Journal, Key
from gripvlm.evaluate.schema import ResultsError, checked_result, is_result

__all__ = ["Results", "evaluation_files", "read_json", "read_results"]

_LITERAL = 4  # what is left at most of a word such as `false` that is cut


@dataclass(frozen=True, eq=False)
class Results:
    """One run's file.

    Attributes:
        path: the JSON.
        content: what is in it, checked against the schema.
        records: every answer by (task, pruner, keep, id); None where `missing` says that they are not there.
        config: what the samples file says it was asked, `{}` without one.
        missing: the samples file that was looked for and not found, else None.
    """

    path: Path
    content: dict[str, Any]
    records: dict[Key, dict[str, Any]] | None
    config: dict[str, Any]
    missing: Path | None = None

    @property
    def header(self) -> dict[str, Any]:
        return self.content["header"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    @property
    def means(self) -> list[dict[str, Any]]:
        return self.content["means"]

    @property
    def unreached(self) -> list[dict[str, Any]]:
        """Pruners at budgets that they cannot reach, and why; they have no row, and perhaps some answers."""
        return self.content.get("unreached", [])

    @property
    def questions(self) -> tuple[str, ...]:
        """What makes two runs comparable question by question: model, weights, tasks with their hashes, prompts."""
        head = self.header
        return (head["model"], head["weights"], *head["tasks"], head["positions"], str(head.get("shard")))

    @property
    def task_specs(self) -> dict[str, str]:
        """Task -> what to type for it; in files that do not say, its name."""
        names = [text.rpartition(" (")[0] for text in self.header["tasks"]]
        return dict(zip(names, self.header.get("task_specs", names), strict=True))

    def of(self, task: str, pruner: str, keep: str) -> dict[str, dict[str, Any]]:
        """id -> record of one row; {} without a samples file."""
        return self._by_row.get((task, pruner, keep), {})

    @cached_property
    def _by_row(self) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
        found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
        for (task, pruner, keep, name), record in (self.records or {}).items():
            found.setdefault((task, pruner, keep), {})[name] = record
        return found


def read_json(path: Path) -> Any:
    """The file's JSON.

    Raises:
        ResultsError: it cannot be read, or is cut off or no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"there is no file {path}: check its name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text.rstrip()) - _LITERAL and not error.msg.startswith("Extra data")
        cut = not text.strip() or ends or error.msg.startswith("Unterminated string")
        what = "is cut off" if cut else f"is no JSON at line {error.lineno} ({error.msg})"
        raise ResultsError(
            f"{path} {what}: run its evaluation again (with the samples file beside it nothing is measured twice), or "
            "restore the file"
        ) from None


def read_results(path: str | Path, answers: bool = True) -> Results:
    """A results file, and the answers beside it (`.samples.jsonl` or `.samples.jsonl.gz`).

    Args:
        answers: whether to read them too.

    Raises:
        ResultsError: cut off, damaged, of a newer version, a row or an answer twice, or answers
            that are not those of the rows.
    """
    path = Path(path)
    content = checked_result(read_json(path), str(path))
    named = path.with_name(content.get("samples") or path.name.removesuffix(".json") + ".samples.jsonl")
    packed = named.with_name(named.name + ".gz")
    if not answers:
        return Results(path, content, None, {})
    found = next((one for one in (named, packed) if one.exists()), None)
    if found is None:
        return Results(path, content, None, {}, missing=named)
    config, records = _answers(found)
    result = Results(path, content, records, config)
    _check(result, found)
    return result


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, OSError) as error:
        raise ResultsError(f"{path} is cut off or damaged ({error}): restore it, or run its evaluation again") from None


def _answers(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """(config, records). A run that was killed may have written an answer twice; two that differ are an error."""
    config: dict[str, Any] = {}
    records: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            if number == 1:
                config = dict(row["config"])
                continue
            if "session" in row:
                continue
            key = Journal.key(row)
            said = row["prediction"], row["score"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ResultsError(
                f"line {number} of {path} is cut off or damaged: run its evaluation again, which goes on from there"
            ) from None
        if key in records and (records[key]["prediction"], records[key]["score"]) != said:
            raise ResultsError(
                f"{path} holds two answers that differ to one question (task {key[0]}, pruner {key[1]}, keep {key[2]}, "
                f"id {key[3]}, line {number}): were two runs appended to one file? Remove one of them"
            )
        records[key] = row
    return config, records


def _check(result: Results, file: Path) -> None:
    """The answers are all there and give the rows' scores."""
    advice = "the two files are not of one run; restore them, or run the evaluation again"
    for row in result.rows:
        mine = result.of(row["task"], row["pruner"], str(row["keep"]))
        said = f"{row['task']}, {row['pruner']}, keep {row['keep']}"
        if len(mine) != row["n"]:
            raise ResultsError(f"{file} has {len(mine)} of the {row['n']} answers of {said} in {result.path}: {advice}")
        score = math.fsum(record["score"] for record in mine.values()) / len(mine)
        if not math.isclose(score, row["score"], abs_tol=1e-9):
            raise ResultsError(
                f"the answers of {said} in {file} score {score:.6f}, but the row in {result.path} says "
                f"{row['score']:.6f}: {advice}"
            )
    known = {(row["task"], row["pruner"], str(row["keep"])) for row in result.rows}
    left = {(one["pruner"], str(one["keep"])) for one in result.unreached}
    strangers = [k for k in result.records or () if k[:3] not in known and k[1] != BLIND and k[1:3] not in left]
    if strangers:
        raise ResultsError(f"{file} has answers that {result.path} has no row for, such as {strangers[0]}: {advice}")


def evaluation_files(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """(evaluations, other JSON files); for a folder's worth of files that a shell pattern names."""
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for path in paths:
        kinds[is_result(read_json(path))].append(path)
    return kinds[True], kinds[False]
