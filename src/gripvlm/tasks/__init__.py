"""Tasks by name: samples + prompt + score. The score is also the reward that a pruner is trained on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from gripvlm.tasks.base import Sample, Task, TaskError, named_choice, normalise
from gripvlm.tasks.benchmarks import BENCHMARKS, benchmark
from gripvlm.tasks.jsonl import JsonlTask
from gripvlm.tasks.lab_tasks import FAMILIES, LabTask
from gripvlm.tasks.metrics import METRICS
from gripvlm.tasks.pictures import open_image
from gripvlm.tasks.table_task import HubTask
from gripvlm.utils.spec import join_options, parse_spec

__all__ = [
    "METRICS",
    "HubTask",
    "JsonlTask",
    "LabTask",
    "Sample",
    "Task",
    "TaskError",
    "get_tasks",
    "named_choice",
    "normalise",
    "open_image",
    "task_names",
]

_OPTIONS = {
    "benchmarks": ("path",),
    **dict.fromkeys(BENCHMARKS, ("path", "repo", "config", "split")),
    "hf": ("config", "split", "image", "question", "answer", "choices", "metric"),
    "jsonl": ("metric",),
    "custom": ("metric",),
}


def task_names() -> list[str]:
    """What `get_tasks` takes, besides `jsonl:PATH` and `hf:REPO`."""
    parts = [f"{name}/{part}" for name, kind in BENCHMARKS.items() for part in kind.parts]
    return ["lab", *(f"lab/{family}" for family in FAMILIES), "benchmarks", *BENCHMARKS, *parts]


def get_tasks(names: str | Task | Sequence[str | Task]) -> list[Task]:
    """The tasks that names stand for; a group's name stands for all of its members.

    Args:
        names: `"lab"` (six tasks), `"lab/reading"`, `"benchmarks"` (six published ones), `"pope"`, `"pope/random"`,
            `"pope:path=/data/pope"`, `"hf:REPO,split=train"`, `"jsonl:my/questions.jsonl,metric=vqa"`, a `Task`, or
            several of them. A task that is named twice is there once. A piece such as `"split=train"` goes on with
            the name before it, so that a list that was cut at commas reads like the text.

    Raises:
        TaskError: an unknown name or option, the nearest known ones are listed; or one task from two places.
    """
    tasks: dict[str, Task] = {}
    for name in [names] if isinstance(names, (str, Task)) else join_options(names):
        # The same name from two places would be two tasks with the same rows.
        for task in [name] if isinstance(name, Task) else _named(name.strip()):
            before = tasks.setdefault(task.name, task)
            if getattr(before, "source", None) != getattr(task, "source", None):
                raise TaskError(f"two data sets for the one task {task.name!r}: run them one after the other")
    if not tasks:
        raise TaskError(f"no task given: type one of {', '.join(task_names())}, hf:REPO or jsonl:PATH")
    return list(tasks.values())


def _named(name: str) -> list[Task]:
    if name == "lab":
        return [LabTask(family) for family in FAMILIES]
    # A path may hold colons itself: only the first one ends the task's kind.
    kind, colon, rest = name.partition(":")
    if kind in ("jsonl", "custom") and rest:
        path, options = _read_options(kind, rest)
        return [JsonlTask(path, metric=options.get("metric", "choice"), name=name)]
    if kind == "hf" and rest:
        repo, options = _read_options(kind, rest)
        return [HubTask(name, repo, options)]
    if kind == "benchmarks":
        _, options = _read_options(kind, rest)
        return [_from_folder(one, options) for one in BENCHMARKS]
    if kind.partition("/")[0] in BENCHMARKS:
        if colon and not rest:
            raise TaskError(f"{name!r} ends too early: type {kind}:path=FOLDER, or {kind} alone for the hub's")
        return [benchmark(kind, _read_options(kind.partition("/")[0], rest)[1])]
    if name in task_names():
        return [LabTask(name.partition("/")[2])]
    if name.endswith((".jsonl", ".json")):
        raise TaskError(f"unknown task {name!r}: for a file of your own questions type jsonl:{name}")
    near = difflib.get_close_matches(name, [*task_names(), *FAMILIES], n=2, cutoff=0.5)
    near = [f"lab/{one}" if one in FAMILIES else one for one in near]
    hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}? " if near else ""
    raise TaskError(f"unknown task {name!r}: {hint}known are {', '.join(task_names())}, hf:REPO and jsonl:PATH")


def _from_folder(name: str, options: Mapping[str, str]) -> Task:
    """One of the six, from the folder of that name where a folder is given."""
    return benchmark(name, {"path": str(Path(options["path"]) / name)} if options else {})


def _read_options(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """("my.jsonl", {"metric": "vqa"}) from "my.jsonl,metric=vqa"; a comma elsewhere belongs to the value before it.

    The six have options only, the others a path or a name before them.
    """
    spec = parse_spec(f"{kind}:{text}", takes_argument=kind in ("jsonl", "custom", "hf"))
    if spec.argument and kind not in ("jsonl", "custom", "hf"):
        raise _no_option(kind, spec.argument)
    options: dict[str, str] = {}
    for key, value in spec.options:
        if key not in _OPTIONS[kind] or not value:
            raise _no_option(kind, f"{key}={value}")
        if key in options:
            raise TaskError(f"{kind} is given {key}= twice: type it once")
        options[key] = value
    return spec.argument, options


def _no_option(kind: str, option: str) -> TaskError:
    return TaskError(f"{kind} has no option {option!r}: type name=value with {', '.join(_OPTIONS[kind])}")
