"""Shards of one grid put together: the file that one machine would have written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gripvlm.eval.assemble import assembled, utc, write_result
from gripvlm.eval.chunks import Shard
from gripvlm.eval.environment import command_line, git_state
from gripvlm.eval.journal import Key, differences, lines_of, samples_path
from gripvlm.eval.results import Results, read_results
from gripvlm.eval.schema import ResultsError
from gripvlm.eval.variants import Arm, digest
from gripvlm.tasks import Sample, Task, get_tasks
from gripvlm.utils import disk
from gripvlm.utils.strict_json import parse

__all__ = ["merge"]

_COPIED = ("versions", "hardware", "attention")


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    tasks: Sequence[Task] | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """All shards of one grid as one result, with its samples file, as an unsharded run writes them.

    Rows, intervals and means are counted anew from the answers. Times are means over the shards'
    machines, which should be of one kind.

    Args:
        paths: the results of `evaluate(..., shard="1/n")` to `"n/n"`, in any order, each with its
            samples file beside it.
        out: where the JSON goes.
        tasks: the tasks that were asked; by default those that the files say were typed.
        overwrite: replace `out` where it exists.

    Returns:
        The result; its header's `shards` has the headers of the parts.

    Raises:
        ResultsError: a file is no shard, a shard is missing or there twice, they are of different
            runs (the difference is named), an answer is in two of them, `tasks` lacks one of
            theirs, or `out` exists.
        TaskError: a task cannot be loaded here.
    """
    target = Path(out)
    answers = samples_path(target)
    with disk.one_writer(target):
        return _merged(paths, target, answers, tasks, overwrite, command)


def _merged(
    paths: Sequence[str | Path],
    target: Path,
    answers: Path,
    tasks: Sequence[Task] | None,
    overwrite: bool,
    command: str | None,
) -> dict[str, Any]:
    if target.exists() and not overwrite:
        raise ResultsError(f"{target} exists: type another --out, or --overwrite")
    if len(paths) < 2:
        raise ResultsError(f"got {len(paths)} file: type two or more shards of one run")
    parts = _in_order([read_results(path) for path in paths])
    config = {name: value for name, value in parts[0].config.items() if name != "shard"}
    chosen = _tasks_of(parts[0], tasks)
    drawn = {task.name: task.take(config["limit"], config["seed"]) for task in chosen}
    for task, text in zip(chosen, config["tasks"], strict=True):
        if text != f"{task.name} ({len(drawn[task.name])}, {digest(drawn[task.name])})":
            raise ResultsError(
                f"task {task.name} has other questions here than in {parts[0].path}: merge where the same data is"
            )
    records = _together(parts)
    left = {(one["pruner"], str(one["keep"])): one for part in parts for one in part.unreached}
    arms = [arm for text in config["arms"] if (arm := _arm(text, parts)).key not in left]
    _complete(arms, drawn, records)
    result = assembled(config["model"], config, arms, chosen, drawn, drawn, records, config["seed"])
    sessions = [session for part in parts for session in part.header["sessions"]]
    heads = [{name: value for name, value in part.header.items() if name != "arms"} for part in parts]
    result["header"] |= {
        "command": command or command_line(),
        "git": git_state(),
        "task_specs": [task.spec for task in chosen],
        **{name: parts[0].header.get(name) for name in _COPIED},
        "finished": utc(),
        "seconds": round(sum(part.header["seconds"] for part in parts), 3),
        "sessions": sessions,
        "shards": heads,
    }
    if left:
        result["unreached"] = list(left.values())
    result["samples"] = answers.name
    lines: list[dict[str, Any]] = [{"config": config}, *({"session": session} for session in sessions)]
    lines += [records[key] for key in _order(arms, drawn, config["batch_size"])]
    text = lines_of(lines)
    if answers.exists() and not overwrite and disk.read_bytes(answers) != text.encode():  # else a merge was killed here
        raise ResultsError(f"{answers} exists: type another --out, or --overwrite")
    disk.write(answers, text)
    write_result(target, result)
    return result


def _tasks_of(part: Results, given: Sequence[Task] | None) -> list[Task]:
    """The tasks of the shard's header, in its order."""
    specs = part.task_specs
    there = {task.name: task for task in (given if given is not None else get_tasks(list(specs.values())))}
    if missing := [name for name in specs if name not in there]:
        raise ResultsError(
            f"{part.path} asked {', '.join(missing)}, but the tasks given are {', '.join(there)}: pass those that were "
            "asked"
        )
    return [there[name] for name in specs]


def _in_order(parts: list[Results]) -> list[Results]:
    """Shards 1 to n, of one run."""
    found: dict[int, Results] = {}
    first = parts[0]
    for part in parts:
        if part.records is None:
            raise ResultsError(f"the answers of {part.path} are not there ({part.missing}): copy them beside it")
        if "shard" not in part.config:
            raise ResultsError(
                f"{part.path} is no shard but a run of its own: merge takes what `gripvlm eval --shard i/n` wrote, one "
                "file a shard (`gripvlm report` shows several runs together)"
            )
        shard, whole = Shard.parse(part.config["shard"]), Shard.parse(first.config["shard"])
        mine, theirs = ({k: v for k, v in one.config.items() if k != "shard"} for one in (part, first))
        if mine != theirs or shard.of != whole.of:
            what = differences(theirs, mine).replace(" then", " there").replace(" now", " here")
            what = what or f"shard: of {whole.of} there, of {shard.of} here"
            raise ResultsError(f"{part.path} and {first.path} are of different runs ({what}): nothing was written")
        if shard.number in found:
            raise ResultsError(
                f"shard {shard} is there twice, in {found[shard.number].path} and {part.path}: leave one of them out"
            )
        found[shard.number] = part
    total = Shard.parse(first.config["shard"]).of
    lacking = [f"{number}/{total}" for number in range(1, total + 1) if number not in found]
    if lacking:
        raise ResultsError(f"shard {', '.join(lacking)} is missing: nothing was written")
    return [found[number] for number in sorted(found)]


def _together(parts: Sequence[Results]) -> dict[Key, dict[str, Any]]:
    records: dict[Key, dict[str, Any]] = {}
    for part in parts:
        for key, record in (part.records or {}).items():
            if key in records:
                raise ResultsError(
                    f"{part.path} holds an answer that another shard has too (task {key[0]}, pruner {key[1]}, keep "
                    f"{key[2]}, id {key[3]}): nothing was written"
                )
            records[key] = record
    return records


def _arm(text: str, parts: Sequence[Results]) -> Arm:
    """The arm from a config's `label keep {...}`; nothing is loaded, since nothing is measured."""
    head, _, options = text.partition(" {")
    label, _, keep = head.rpartition(" ")
    rows = (row for part in parts for row in [*part.rows, *part.unreached])
    row = next((row for row in rows if row["pruner"] == label and str(row["keep"]) == keep), None)
    return Arm(
        label, None if row is None else row["keep"], None, parse("{" + options), bool((row or {}).get("trained"))
    )


def _order(arms: Sequence[Arm], drawn: dict[str, list[Sample]], batch: int) -> list[Key]:
    """The keys as one run writes them: batch by batch, arm by arm."""
    return [
        (task, arm.label, arm.keep_text, sample.id)
        for task, samples in drawn.items()
        for start in range(0, len(samples), batch)
        for arm in arms
        for sample in samples[start : start + batch]
    ]


def _complete(arms: Sequence[Arm], drawn: dict[str, list[Sample]], records: dict[Key, dict[str, Any]]) -> None:
    lacking = [key for key in _order(arms, drawn, 1) if key not in records]
    if lacking:
        raise ResultsError(f"{len(lacking)} answers are in no shard, such as {lacking[0]}: run that shard again")
