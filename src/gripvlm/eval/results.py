"""The one JSON of an evaluation: its rows, its published schema, and reading it back with its answers."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from gripvlm.errors import GripError
from gripvlm.eval.answering import SECONDS
from gripvlm.eval.journal import read_rows, samples_path
from gripvlm.eval.records import Key, key_of
from gripvlm.eval.stats import ScoresByImage, interval
from gripvlm.eval.variants import BLIND
from gripvlm.tasks.base import Sample, Task, normalise
from gripvlm.utils import disk
from gripvlm.utils.strict_json import BadJSON, read

__all__ = ["Results", "ResultsError", "evaluation_files", "read_results", "write_result"]

_KIND, _VERSION = "gripvlm.evaluate", 1
SCHEMA = f"{_KIND}/{_VERSION}"
# Violations of the schema in one message.
_SHOWN = 3
# Characters: a small .gz may unpack to a line without end.
_MAX_LINE = 2**24
_OPTIONS = ("model", "weights", "tasks", "arms", "limit", "seed", "batch_size", "positions", "dtype")


class ResultsError(GripError):
    """A results file cannot be read, or is damaged or inconsistent."""


# --- rows ---------------------------------------------------------------------------------------------------------


def majority(task: Task, samples: Sequence[Sample]) -> tuple[str, float]:
    """The commonest answer, and the mean score of always giving it."""
    counts = Counter(normalise(sample.answer) for sample in samples)
    # Of equally common answers the first by alphabet, so that reruns agree.
    common = min(counts, key=lambda answer: (-counts[answer], answer))
    return common, float(np.mean([task.score(common, sample) for sample in samples]))


def make_row(
    head: Mapping[str, Any], records: Sequence[Mapping[str, Any]], blind: float | None, majority_score: float, seed: int
) -> dict[str, Any]:
    """One row of the results: `head` (model, task, pruner, ...) and the means of its records."""
    scores = [record["score"] for record in records]
    low, high = interval([(scores, [record["image_id"] for record in records])], seed)
    times = {f"seconds_{name}": float(np.mean([record["seconds"][name] for record in records])) for name in SECONDS}
    # Only of pruners that drop inside the vision tower.
    tower = [record["tower"] for record in records if "tower" in record]
    return {
        **head,
        **({"tower_tokens": float(np.mean(tower))} if tower else {}),
        "keep_fraction": float(np.mean([record["k"] / record["n"] for record in records])),
        "tokens": float(np.mean([record["k"] for record in records])),
        "score": float(np.mean(scores)),
        "ci_low": low,
        "ci_high": high,
        "n": len(records),
        "blind": blind,
        "majority": majority_score,
        **times,
        "seconds_total": sum(times.values()),
        "peak_memory": _highest(records),
    }


def mean_rows(
    rows: Sequence[dict[str, Any]], scores: Mapping[tuple[str, str, str], ScoresByImage], seed: int
) -> list[dict[str, Any]]:
    """One row for each pruner and keep that several tasks have: the plain mean over tasks, with its own interval.

    Args:
        rows: of all tasks.
        scores: (task, pruner, keep) -> scores and images.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pruner"], str(row["keep"])), []).append(row)
    means = []
    for (pruner, keep), members in groups.items():
        if len(members) < 2:
            continue
        averaged = ["keep_fraction", "tokens", "score", "majority", "seconds_total", *(f"seconds_{s}" for s in SECONDS)]
        averaged += ["tower_tokens"] if all("tower_tokens" in row for row in members) else []
        # One task without the blind score would make the mean that of other tasks.
        if all(row["blind"] is not None for row in members):
            averaged.append("blind")
        mean = members[0] | {name: float(np.mean([row[name] for row in members])) for name in averaged}
        mean["ci_low"], mean["ci_high"] = interval([scores[row["task"], pruner, keep] for row in members], seed)
        mean |= {"task": "mean", "n": sum(row["n"] for row in members), "extras": {}}
        mean["peak_memory"] = _highest(members)
        means.append(mean)
    return means


def _highest(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The highest of their peaks of memory; a processor counts none."""
    return max((row["peak_memory"] for row in rows if row.get("peak_memory") is not None), default=None)


# --- the schema ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _validator() -> Any:
    """Of `results.schema.json` (draft 2020-12), in which a number is a finite one."""
    # Imported here, since many commands import this file and never check a result.
    from jsonschema import Draft202012Validator, validators

    checker = Draft202012Validator.TYPE_CHECKER.redefine("number", _is_finite_number)
    schema = json.loads(files("gripvlm.eval").joinpath("results.schema.json").read_text(encoding="utf-8"))
    return validators.extend(Draft202012Validator, type_checker=checker)(schema)


def _is_finite_number(checker: object, value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _violation(error: Any) -> str:
    """`rows[2].n: 0 is less than the minimum of 1`; the end of the message says what is wrong, its start the value."""
    message = error.message if len(error.message) <= 160 else f"...{error.message[-160:]}"
    return f"{error.json_path.removeprefix('$').removeprefix('.') or 'the file'}: {message}"


def _is_result(content: Any) -> bool:
    """Whether this is an evaluation's JSON, of any version."""
    return isinstance(content, dict) and str(content.get("schema", "")).partition("/")[0] == _KIND


def check_result(content: Any, where: str) -> dict[str, Any]:
    """The content, known to be a whole results file of a version that is known here.

    Raises:
        ResultsError: it is something else, of a newer version, against the schema (up to three places are named), or
            holds a row twice.
    """
    if not _is_result(content):
        raise ResultsError(f"{where} is no result of an evaluation: use a file that `gripvlm eval --out` wrote")
    version = content["schema"].partition("/")[2]
    if not version.isdecimal():
        raise ResultsError(f"{where} has the schema {content['schema']!r}, expected {SCHEMA!r}: is it damaged?")
    if int(version) > _VERSION:
        raise ResultsError(
            f"{where} was written by a newer gripvlm (schema {content['schema']}, this one reads up to {SCHEMA}): "
            "pip install --upgrade gripvlm"
        )
    wrong = [_violation(error) for error in _validator().iter_errors(content)]
    # Two things that a JSON schema cannot say.
    if not wrong:
        tasks, specs = content["header"]["tasks"], content["header"].get("task_specs")
        if specs is not None and len(specs) != len(tasks):
            wrong.append(f"header.task_specs has {len(specs)} entries for {len(tasks)} tasks")
        for part in ("rows", "means"):
            keys = Counter((row["task"], row["pruner"], str(row["keep"])) for row in content[part])
            for (task, pruner, keep), count in keys.items():
                if count > 1:
                    wrong.append(f"it holds a row twice in {part!r}: task {task}, pruner {pruner}, keep {keep}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ResultsError(
            f"{where} does not follow the schema {SCHEMA}: {'; '.join(wrong[:_SHOWN])}{more}. Run the evaluation "
            "again, or restore the file"
        )
    return content


def write_result(target: Path, result: Mapping[str, Any]) -> None:
    """Checked against the published schema, then written; never half of it.

    Raises:
        ResultsError: a task's own numbers are not what the schema allows.
    """
    # As a reader will see it: a numpy number or a NaN of a task shows now and not when the file is read.
    check_result(json.loads(json.dumps(result)), str(target))
    disk.write(target, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Results:
    """One run's file.

    Attributes:
        path: the JSON.
        content: its content, checked against the schema.
        records: every answer by (task, pruner, keep, id); None where `missing` says that they are not there.
        missing: the samples file that was looked for and is not there, else None.
    """

    path: Path
    content: dict[str, Any]
    records: dict[Key, dict[str, Any]] | None
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
        return (self.header["model"], self.header["weights"], *self.header["tasks"], self.header["positions"])

    @property
    def task_specs(self) -> dict[str, str]:
        """Task -> the text that selects it on the command line; its name if the file has no such text."""
        names = [text.rpartition(" (")[0] for text in self.header["tasks"]]
        return dict(zip(names, self.header.get("task_specs", names), strict=True))

    def of(self, task: str, pruner: str, keep: str) -> dict[str, dict[str, Any]]:
        """id -> record of one row; {} without a samples file."""
        return self._by_row.get((task, pruner, keep), {})

    @cached_property
    def _by_row(self) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
        by_row: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
        for (task, pruner, keep, name), record in (self.records or {}).items():
            by_row.setdefault((task, pruner, keep), {})[name] = record
        return by_row


def _read_json(path: Path) -> Any:
    """The file's JSON.

    Raises:
        ResultsError: it cannot be read, is cut off, no JSON, or none that can be used.
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


def read_results(path: str | Path) -> Results:
    """A results file, and its file of answers (`.samples.jsonl` or `.samples.jsonl.gz`).

    Raises:
        ResultsError: cut off, damaged, of a newer version, a row or an answer twice, or answers that are not those of
            the rows.
    """
    path = Path(path)
    content = check_result(_read_json(path), str(path))
    name = content.get("samples") or samples_path(path).name
    # A stranger's file may name any path: only one beside the file is read.
    if name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ResultsError(f"{path} says that its samples are {name!r}: write the name of a file in the same folder")
    # Published files have their answers packed.
    plain = path.with_name(name)
    file = next((file for file in (plain, path.with_name(f"{name}.gz")) if file.exists()), None)
    if file is None:
        return Results(path, content, None, missing=plain)
    config, records = _read_answers(file)
    results = Results(path, content, records)
    if problem := _contradiction(results, config):
        raise ResultsError(
            f"{file} and {path} are not of one run: {problem}. Restore them, or run the evaluation again"
        )
    return results


def evaluation_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(evaluations, other JSON files); for the files of a folder that a shell pattern names."""
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for path in paths:
        kinds[_is_result(_read_json(path))].append(path)
    return kinds[True], kinds[False]


def _lines(path: Path) -> Iterator[str]:
    try:
        disk.regular(path)
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            while line := file.readline(_MAX_LINE):
                if len(line) == _MAX_LINE:
                    raise ResultsError(f"{path} has a line of {_MAX_LINE} characters or more: no evaluation wrote it")
                yield line
    except (EOFError, zlib.error, UnicodeDecodeError, OSError) as error:
        raise ResultsError(f"{path} is cut off or damaged ({error}): restore it, or run its evaluation again") from None


def _read_answers(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """(configuration, records). An answer that is there twice counts once; two that differ are an error."""
    config: dict[str, Any] = {}
    records: dict[Key, dict[str, Any]] = {}
    advice = "run its evaluation again, which resumes there"
    for number, row in read_rows(_lines(path), path, lambda text: ResultsError(f"{text}: {advice}")):
        if number == 1:
            config = row["config"]
        elif "session" not in row:
            key = key_of(row)
            # A killed run may have written part of a batch, and measured all of it again.
            known = records.get(key, row)
            if (known["prediction"], known["score"]) != (row["prediction"], row["score"]):
                raise ResultsError(
                    f"{path} holds two answers that differ to one question (task {key[0]}, pruner {key[1]}, keep "
                    f"{key[2]}, id {key[3]}, line {number}): were two runs appended to one file? Remove one of them"
                )
            records[key] = row
    return config, records


def _contradiction(results: Results, config: Any) -> str:
    """The first way in which the answers are not those of the rows; "" where they are all there and give the scores."""
    if not isinstance(config, dict):
        return "the first line of the answers has other options"
    if differ := [name for name in _OPTIONS if config.get(name) != results.header.get(name)]:
        return f"the first line of the answers has other options ({', '.join(differ)})"
    for row in results.rows:
        answers = results.of(row["task"], row["pruner"], str(row["keep"]))
        title = f"{row['task']}, {row['pruner']}, keep {row['keep']}"
        if len(answers) != row["n"]:
            return f"there are {len(answers)} of the {row['n']} answers of {title}"
        # fsum, since the rounding of a plain sum depends on the order of the lines.
        score = math.fsum(record["score"] for record in answers.values()) / len(answers)
        if not math.isclose(score, row["score"], abs_tol=1e-9):
            return f"the answers of {title} score {score:.6f}, but its row says {row['score']:.6f}"
    rows = {(row["task"], row["pruner"], str(row["keep"])) for row in results.rows}
    # A pruner that failed at a late image has answers to the questions before it, and no row.
    unreached = {(row["pruner"], str(row["keep"])) for row in results.unreached}
    for key in results.records or ():
        if key[:3] not in rows and key[1] != BLIND and key[1:3] not in unreached:
            return f"there are answers without a row, such as {key}"
    return ""
