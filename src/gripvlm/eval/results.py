"""Reading results files back: whole, of a version that is known, and with the answers that belong to them."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.eval.journal import Journal, Key, samples_path
from gripvlm.eval.schema import ResultsError, checked_record, checked_result, is_result
from gripvlm.eval.variants import BLIND
from gripvlm.utils.disk import regular
from gripvlm.utils.strict_json import BadJSON, parse, read

__all__ = ["Results", "evaluation_files", "read_json", "read_results"]

_ASKED = {"model", "weights", "tasks", "arms", "limit", "seed", "batch_size"}
_SAME = {*_ASKED, "positions", "dtype", "shard"}
_LONGEST = 2**24  # characters of a line: what a small .gz unpacks to has no end


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
        ResultsError: it cannot be read, or is cut off, no JSON, or none that can be used.
    """
    try:
        return read(path)
    except FileNotFoundError:
        raise ResultsError(f"there is no file {path}: check its name") from None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}") from None
    except BadJSON as error:
        raise ResultsError(
            f"{path} {error}: run its evaluation again (with the samples file beside it nothing is measured twice), or "
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
    name = content.get("samples") or samples_path(path).name
    if name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ResultsError(f"{path} says that its samples are {name!r}: write the name of a file in the same folder")
    named = path.with_name(name)
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
        regular(path)
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            while line := file.readline(_LONGEST):
                if len(line) == _LONGEST:
                    raise ResultsError(f"{path} has a line of {_LONGEST} characters or more: no evaluation wrote it")
                yield line
    except (EOFError, zlib.error, UnicodeDecodeError, OSError) as error:
        raise ResultsError(f"{path} is cut off or damaged ({error}): restore it, or run its evaluation again") from None


def _answers(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """(config, records). A run that was killed may have written an answer twice; two that differ are an error."""
    config: dict[str, Any] = {}
    records: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            row = parse(line)
            if number == 1:
                config = dict(row["config"])
                continue
            if "session" in row:
                continue
            key = Journal.key(checked_record(row))
            said = row["prediction"], row["score"]
        except (BadJSON, KeyError, TypeError, ValueError) as error:
            why = f" (it {error})" if isinstance(error, BadJSON) else ""
            raise ResultsError(
                f"line {number} of {path} is cut off or damaged{why}: run its evaluation again, which goes on there"
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
    unlike = {name for name in _SAME if result.config.get(name) != result.header.get(name)}
    if unlike or not result.config.keys() >= _ASKED:
        raise ResultsError(f"the first line of {file} has other options than {result.path}: {advice}")
    for row in result.rows:
        first = next(one for one in result.rows if one["task"] == row["task"])
        here, there = (result.of(one["task"], one["pruner"], str(one["keep"])).keys() for one in (row, first))
        if lonely := sorted(here ^ there):
            both = f"{row['pruner']} and {first['pruner']}"
            raise ResultsError(
                f"{file} has an answer to {row['task']}, id {lonely[0]}, of one of {both} only: {advice}"
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
