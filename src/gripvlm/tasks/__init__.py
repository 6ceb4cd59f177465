"""Tasks by name: samples + prompt + score. The score is also the reward that a pruner is trained on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from gripvlm.tasks.base import Sample, Task, TaskError, named_choice, normalise, open_image
from gripvlm.tasks.jsonl import JsonlTask
from gripvlm.tasks.lab_tasks import FAMILIES, LabTask

__all__ = [
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


def task_names() -> list[str]:
    """What `get_tasks` takes, besides `jsonl:PATH`."""
    return ["lab", *(f"lab/{family}" for family in FAMILIES)]


def get_tasks(names: str | Task | Sequence[str | Task]) -> list[Task]:
    """The tasks that names stand for; a group's name stands for all of its members.

    Args:
        names: `"lab"` (six tasks), `"lab/reading"`, `"jsonl:my/questions.jsonl"`, a `Task`, or
            several of them. A task that is named twice is there once.

    Raises:
        TaskError: an unknown name; the nearest known ones are listed.
    """
    tasks: dict[str, Task] = {}
    for name in [names] if isinstance(names, (str, Task)) else names:
        for task in [name] if isinstance(name, Task) else _named(name.strip()):
            tasks.setdefault(task.name, task)
    if not tasks:
        raise TaskError(f"no task given: type one of {', '.join(task_names())} or jsonl:PATH")
    return list(tasks.values())


def _named(name: str) -> list[Task]:
    if name == "lab":
        return [LabTask(family) for family in FAMILIES]
    kind, _, rest = name.partition(":")
    if kind == "jsonl" and rest:
        return [JsonlTask(rest)]
    if name in task_names():
        return [LabTask(name.partition("/")[2])]
    if name.endswith((".jsonl", ".json")):
        raise TaskError(f"unknown task {name!r}: for a file of your own questions type jsonl:{name}")
    near = difflib.get_close_matches(name, [*task_names(), *FAMILIES], n=2, cutoff=0.5)
    near = [f"lab/{one}" if one in FAMILIES else one for one in near]
    hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}? " if near else ""
    raise TaskError(f"unknown task {name!r}: {hint}known are {', '.join(task_names())} and jsonl:PATH")
