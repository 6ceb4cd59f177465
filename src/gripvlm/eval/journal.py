"""The samples file: every answer is on disk as soon as it is there, so that a stopped run resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gripvlm.errors import GripError
from gripvlm.eval.records import Key, check_record, key_of
from gripvlm.utils import disk
from gripvlm.utils.strict_json import BadJSON, parse

__all__ = ["Journal", "ResumeError", "samples_path"]

_SHARD = re.compile(r"\.\d+of\d+\.samples\.jsonl")


class ResumeError(GripError):
    """The samples file belongs to another run, or is damaged."""


def samples_path(out: Path, shard: tuple[int, int] | None = None) -> Path:
    """`results/F.json` -> `results/F.samples.jsonl`, or `results/F.2of3.samples.jsonl` for the shard (2, 3)."""
    part = "" if shard is None else f".{shard[0]}of{shard[1]}"
    return out.with_name(f"{out.name.removesuffix('.json')}{part}.samples.jsonl")


def read_rows(
    lines: Iterable[str | bytes], path: Path, error: Callable[[str], GripError]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, content) of each line of a samples file: first the configuration, then sessions and checked answers.

    Raises:
        GripError: made by `error`, where a line is damaged.
    """
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line)
            if number == 1:
                row = {"config": row["config"]}
            elif "session" not in row:
                check_record(row)
        except (BadJSON, KeyError, TypeError) as problem:
            why = f" (it {problem})" if isinstance(problem, BadJSON) else ""
            raise error(f"line {number} of {path} is cut off or damaged{why}") from None
        yield number, row


class Journal:
    """Records by (task, pruner, keep, id), kept in memory and, with a path, in a JSON Lines file.

    The first line holds the configuration, each session of work adds one line of its own, all others are records. A
    record that is written twice counts once. A last line without its end is what a killed run leaves, and is dropped.
    Whoever enters `session` must be the only writer (`disk.one_writer`).
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any], overwrite: bool = False) -> None:
        """Reads the file; nothing is written before a session begins.

        Raises:
            ResumeError: it belongs to another configuration (the differences are named), or a line in its middle is
                damaged.
        """
        self.path, self._overwrite = path, overwrite
        # As it will be read back: tuples are lists there, and would differ.
        self.config = json.loads(json.dumps(config))
        self.sessions: list[dict[str, Any]] = []
        self.records: dict[Key, dict[str, Any]] = {}
        self._from_shards: list[dict[str, Any]] = []
        self._complete_bytes = 0
        if path is not None and path.exists() and not overwrite:
            self._complete_bytes = self._read(path)

    def read_shards(self) -> None:
        """Takes the answers that `--shard` runs of the same configuration left beside the file.

        They are copied into the file when a session begins.

        Raises:
            ResumeError: as for the file itself.
        """
        if self.path is None or self._overwrite or not self.path.parent.is_dir():
            return
        name, known = self.path.name.removesuffix(".samples.jsonl"), set(self.records)
        for path in sorted(self.path.parent.iterdir()):
            if path.name.startswith(name) and _SHARD.fullmatch(path.name.removeprefix(name)):
                self._read(path)
        self._from_shards = [record for key, record in self.records.items() if key not in known]

    def _read(self, path: Path) -> int:
        """Adds the file's sessions and records; returns the number of bytes of its complete lines."""
        content = disk.read_bytes(path)
        # A killed run may have left half a line at the end.
        content = content[: content.rfind(b"\n") + 1]
        config: Any = None
        sessions: list[dict[str, Any]] = []
        records: dict[Key, dict[str, Any]] = {}
        advice = "remove that line to have it measured again, or pass overwrite=True (--overwrite) to start again"
        rows = read_rows(content.splitlines(), path, lambda text: ResumeError(f"{text}: {advice}"))
        for number, row in rows:
            if number == 1:
                config = row["config"]
            elif "session" in row:
                sessions.append(row["session"])
            else:
                records[key_of(row)] = row
        if records and config != self.config:
            raise ResumeError(
                f"{path} holds {len(records)} answers of another run ({differences(config, self.config)}): choose "
                "another out, use the same options to resume it, or pass overwrite=True (--overwrite) to start again"
            )
        # A file without answers holds nothing to resume, whatever its configuration.
        if records:
            self.sessions += sessions
            # Own answers count before those of shards, which are read later.
            self.records = records | self.records
        return len(content)

    def has(self, task: str, pruner: str, keep: str, ids: Iterable[str]) -> bool:
        """Whether every one of these samples is answered."""
        return all((task, pruner, keep, name) in self.records for name in ids)

    def session(self, session: dict[str, Any]) -> None:
        """Begins to write: makes the file, or resumes it, with a line about this session of work."""
        own = len(self.records) > len(self._from_shards)
        self.sessions.append(session)
        if self.path is not None and own:
            # The half line goes first, or the next line would be written behind it.
            disk.cut(self.path, self._complete_bytes)
            disk.append(self.path, _lines([{"session": session}]))
        elif self.path is not None:
            disk.write(self.path, _lines([{"config": self.config}, {"session": session}]))
        self.add(self._from_shards)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Keeps the records; when this returns they are in the file."""
        if self.path is not None:
            disk.append(self.path, _lines(records))
        # After the write: a full disk must not leave answers in memory that the file does not have.
        self.records.update((key_of(record), record) for record in records)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def differences(then: Any, now: Any) -> str:
    """The options that differ, as `limit: 20 then, 40 now`."""
    if not isinstance(then, dict):
        return "unknown options"
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(f"{name}: {_difference(then.get(name), now.get(name))}" for name in names)


def _difference(then: Any, now: Any) -> str:
    """Of lists and dicts only what is in one of them."""
    if isinstance(then, dict) and isinstance(now, dict):
        then, now = ([f"{key} {value}" for key, value in options.items()] for options in (then, now))
    if not (isinstance(then, list) and isinstance(now, list)):
        return f"{_short(then)} then, {_short(now)} now"
    lost, new = [value for value in then if value not in now], [value for value in now if value not in then]
    parts = [f"{_short(values)} only {when}" for values, when in ((lost, "then"), (new, "now")) if values]
    return ", ".join(parts) or "in another order"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
