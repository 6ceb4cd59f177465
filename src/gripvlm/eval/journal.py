"""The samples file: every finished answer at once on disk, so that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gripvlm.errors import GripError
from gripvlm.eval.schema import checked_record
from gripvlm.utils import disk
from gripvlm.utils.strict_json import BadJSON, parse

__all__ = ["Journal", "Key", "ResumeError", "differences", "lines_of", "samples_path"]

Key = tuple[str, str, str, str]
_KEY = ("task", "pruner", "keep", "id")


class ResumeError(GripError):
    """The samples file cannot be gone on from."""


def samples_path(out: Path) -> Path:
    """`results/F.json` -> `results/F.samples.jsonl`."""
    return out.with_name(out.name.removesuffix(".json") + ".samples.jsonl")


def lines_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Journal:
    """Records by (task, pruner, keep, id), kept in memory and, with a path, in a JSON Lines file.

    The first line holds the configuration, each session of work adds one line of its own, all others
    are records. A record that is written twice counts once. A last line without its end is what a
    killed run leaves, and is dropped. Whoever enters the block is the only writer (`disk.one_writer`).
    """

    def __init__(
        self, path: Path | None, config: Mapping[str, Any], session: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        """Reads what is there; nothing is written before the block is entered.

        Raises:
            ResumeError: it belongs to another configuration (the differences are named), or a line
                in its middle is damaged.
        """
        self.path = path
        self.config = json.loads(json.dumps(config))
        self.sessions: list[dict[str, Any]] = []
        self.records: dict[Key, dict[str, Any]] = {}
        self._session = dict(session)
        self._open = False
        if path is None:
            return
        old = b"" if overwrite or not path.exists() else disk.read_bytes(path)
        whole = old[: old.rfind(b"\n") + 1]
        self._whole = len(whole)
        self._read(whole)

    def _read(self, content: bytes) -> None:
        theirs: Any = None
        for number, line in enumerate(content.splitlines(), 1):
            try:
                row = parse(line)
                if number == 1:
                    theirs = row["config"]
                elif "session" in row:
                    self.sessions.append(row["session"])
                else:
                    self.records[self.key(checked_record(row))] = row
            except (BadJSON, KeyError, TypeError) as error:
                why = f" (it {error})" if isinstance(error, BadJSON) else ""
                raise ResumeError(
                    f"line {number} of {self.path} is damaged{why}: remove that line to have it measured again, or "
                    "type --overwrite to start anew"
                ) from None
        if not self.records:
            self.sessions = []
            return
        if theirs != self.config:
            raise ResumeError(
                f"{self.path} holds {len(self.records)} answers of another run ({differences(theirs, self.config)}): "
                "choose another --out, type the same options again to go on with it, or type --overwrite to start anew"
            )

    @staticmethod
    def key(record: Mapping[str, Any]) -> Key:
        task, pruner, keep, sample = (str(record[name]) for name in _KEY)
        return task, pruner, keep, sample

    def has(self, task: str, pruner: str, keep: str, samples: Iterable[str]) -> bool:
        """Whether every one of these samples is there."""
        return all((task, pruner, keep, sample) in self.records for sample in samples)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Keeps the records; when this returns they are in the file."""
        if self.path is not None and self._open:
            disk.append(self.path, lines_of(records))
        for record in records:
            self.records[self.key(record)] = record

    def __enter__(self) -> Journal:
        """Opens the file, or goes on from what is there, with a line that a session began."""
        self.sessions.append(self._session)
        if self.path is not None and self.records:
            disk.cut(self.path, self._whole)
            disk.append(self.path, lines_of([{"session": self._session}]))
        elif self.path is not None:
            disk.write(self.path, lines_of([{"config": self.config}, {"session": self._session}]))
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False


def differences(then: Any, now: Any) -> str:
    """The options that differ, as `limit: 20 then, 40 now`."""
    if not isinstance(then, dict):
        return "unknown options"
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(_difference(name, then.get(name), now.get(name)) for name in names)


def _difference(name: str, then: Any, now: Any) -> str:
    """Of lists and dicts only what is in one of them."""
    if isinstance(then, dict) and isinstance(now, dict):
        then, now = ([f"{key} {value}" for key, value in one.items()] for one in (then, now))
    if isinstance(then, list) and isinstance(now, list):
        lost, new = [one for one in then if one not in now], [one for one in now if one not in then]
        said = [f"{_short(some)} only {when}" for some, when in ((lost, "then"), (new, "now")) if some]
        return f"{name}: {', '.join(said) or 'in another order'}"
    return f"{name}: {_short(then)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
