"""Tasks by name: samples + prompt + score. The score is also the reward that a pruner is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gripvlm.tasks.base import Sample, Task, TaskError, named_choice, normalise
from gripvlm.tasks.benchmarks import BENCHMARKS, benchmark
from gripvlm.tasks.jsonl import JsonlTask
from gripvlm.tasks.lab_tasks import FAMILIES, LabTask, dense_families
from gripvlm.tasks.metrics import METRICS
from gripvlm.tasks.pictures import open_image
from gripvlm.tasks.table_task import HubTask
from gripvlm.utils.spec import did_you_mean, join_options, parse_spec

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
    """What `get_tasks` takes, besides `lab-dense/FAMILY`, `jsonl:PATH` and `hf:REPO`."""
    parts = [f"{name}/{part}" for name, kind in BENCHMARKS.items() for part in kind.parts]
    return ["lab", *(f"lab/{family}" for family in FAMILIES), "lab-dense", "benchmarks", *BENCHMARKS, *parts]


def get_tasks(names: str | Task | Sequence[str | Task]) -> list[Task]:
    """The tasks that names stand for; a group's name stands for all of its members.

    Args:
        names: `"lab"` (six tasks), `"lab/reading"`, `"lab-dense"` (a task for each family in its sample),
            `"benchmarks"` (six published ones), `"pope"`, `"pope/random"`, `"pope:path=/data/pope"`,
            `"hf:REPO,split=train"`, `"jsonl:my/questions.jsonl,metric=vqa"`, a `Task`, or several of them. A task that
            is named twice is there once. A piece such as `"split=train"` goes on with the name before it, so that a
            list that was cut at commas reads like the text.

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
    """The tasks of one name; it has options where there is a colon."""
    # A path may hold colons itself: only the first one ends the task's kind.
    kind, colon, rest = name.partition(":")
    benchmark_name = kind.partition("/")[0]
    if name == "lab":
        return [LabTask(family) for family in FAMILIES]
    if name == "lab-dense":
        return [LabTask(family, lab=name) for family in dense_families()]
    if name.startswith("lab-dense/"):
        return [LabTask(name.partition("/")[2], lab="lab-dense")]
    if kind in ("jsonl", "custom") and rest:
        path, options = _read_options(kind, rest)
        return [JsonlTask(path, metric=options.get("metric", "choice"), name=name)]
    if kind == "hf" and rest:
        repo, options = _read_options(kind, rest)
        return [HubTask(name, repo, options)]
    if kind == "benchmarks":
        # Of a folder that holds all six, each takes the one of its name.
        folder = _read_options(kind, rest)[1].get("path")
        return [benchmark(name, {"path": str(Path(folder) / name)} if folder else {}) for name in BENCHMARKS]
    if benchmark_name in BENCHMARKS:
        if colon and not rest:
            raise TaskError(f"{name!r} ends too early: type {kind}:path=FOLDER, or {kind} alone for the hub's")
        return [benchmark(kind, _read_options(benchmark_name, rest)[1])]
    if name in task_names():
        return [LabTask(name.partition("/")[2])]
    if name.endswith((".jsonl", ".json")):
        raise TaskError(f"unknown task {name!r}: for a file of your own questions type jsonl:{name}")
    hint = did_you_mean(name, task_names(), count=2, cutoff=0.5)
    raise TaskError(f"unknown task {name!r}: {hint}known are {', '.join(task_names())}, hf:REPO and jsonl:PATH")


def _read_options(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """("my.jsonl", {"metric": "vqa"}) from "my.jsonl,metric=vqa"; a comma elsewhere belongs to the value before it."""
    takes_argument = kind in ("jsonl", "custom", "hf")
    spec = parse_spec(f"{kind}:{text}", takes_argument)
    known = ", ".join(_OPTIONS[kind])
    if spec.argument and not takes_argument:
        raise TaskError(f"{kind} has no option {spec.argument!r}: type name=value with {known}")
    options: dict[str, str] = {}
    for key, value in spec.options:
        if key not in _OPTIONS[kind] or not value:
            raise TaskError(f"{kind} has no option '{key}={value}': type name=value with {known}")
        if key in options:
            raise TaskError(f"{kind} is given {key}= twice: type it once")
        options[key] = value
    return spec.argument, options
