"""`gripvlm demo --static`: questions, failures first, with what each method kept and answered, in one HTML file."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from transformers import PreTrainedModel

from gripvlm.budget import Budget, Keep
from gripvlm.demo.compare import Answered, Asker, Comparison
from gripvlm.errors import GripError
from gripvlm.eval import environment, evaluate, read_results
from gripvlm.eval.environment import command_line
from gripvlm.eval.results import Results
from gripvlm.eval.variants import FULL
from gripvlm.tasks import Sample, Task
from gripvlm.utils import disk

__all__ = ["AT", "CASES", "KEEPS", "gallery", "write"]

KEEPS: tuple[Keep, ...] = (0.05, 0.1, 0.25, 0.5)
"""The budgets of the page's slider."""
AT: Keep = 0.1
"""The budget that questions are chosen at, one of KEEPS."""
SIDE = 400  # pixels of a picture's longer side at most

# How the unpruned model and the methods answer -> how many such questions are shown. The order is the page's.
CASES = {
    "every method loses the right answer": 3,
    "{first} loses the right answer, another method keeps it": 3,
    "{first} keeps the right answer, another method loses it": 2,
    "no method loses the right answer": 2,
    "wrong with all tokens, right with fewer": 1,
    "wrong with all tokens and with fewer": 1,
}
_LOST, _FIRST, _OTHER, _HELD, _WON, _WRONG = CASES


class Chosen(NamedTuple):
    """A question to show, and the case that it is an example of."""

    case: str
    task: Task
    sample: Sample


def gallery(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task],
    pruners: Sequence[str],
    *,
    model_name: str,
    limit: int = 24,
    repeats: int = 3,
) -> dict[str, Any]:
    """What the page shows, as JSON holds it.

    Args:
        limit: questions a task to choose from; the page says how many there were of each case.
        repeats: times are medians of so many runs; 0 leaves them out.

    Raises:
        GripError: nothing but `full` to show, or a model whose tokens' places are not known; also the errors of
            `evaluate`.
    """
    asker = Asker(model, processor, max(task.max_new_tokens for task in tasks))
    (first,) = tasks[0].take(1, 0)
    _check_picture(asker.compare(first.images, first.question, [], AT))  # before hours of questions
    questions, cases, methods = choose(model, processor, tasks, pruners, limit, model_name)
    content = _Content()
    titles = {name: name.format(first=methods[0]) for name in CASES}
    examples = [content.example(asker, one, methods, repeats) | {"case": titles[one.case]} for one in questions]
    return {
        "model": model_name,
        "tasks": [task.name for task in tasks],
        "methods": methods,
        "keeps": [Budget.of(keep).short for keep in KEEPS],
        "start": KEEPS.index(AT),
        "cases": [{"name": title, "count": cases[name]} for name, title in titles.items()],
        "limit": limit,
        "repeats": repeats,
        "command": command_line(),
        **environment(),
        "pictures": content.pictures,
        "boxes": content.boxes,
        "rows": content.rows,
        "examples": examples,
    }


def write(data: dict[str, Any], folder: str | Path) -> Path:
    """`folder/index.html` with what `gallery` found; it needs no other file and no server."""
    # JSON in a script element must not end it
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    loader = PackageLoader("gripvlm", "demo")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    target = Path(folder)
    with disk.one_writer(target, folder=True):
        disk.write(target / "index.html", pages.get_template("gallery.html.jinja").render(data=data, text=text))
    return target / "index.html"


def choose(
    model: PreTrainedModel, processor: Any, tasks: Sequence[Task], pruners: Sequence[str], limit: int, model_name: str
) -> tuple[list[Chosen], Counter[str], list[str]]:
    """(questions to show, how many there were of each case, the methods that reach `AT`)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        result = evaluate(
            model,
            processor,
            tasks,
            pruners,
            [AT],
            limit=limit,
            batch_size=16,
            out=file,
            blind=False,
            model_name=model_name,
            progress=True,
        )
        results = read_results(file)
        methods = [name for name in dict.fromkeys(row["pruner"] for row in result["rows"]) if name != FULL]
        if not methods:
            raise GripError("there is no method to show: pass one that drops tokens, such as divprune")
        found: dict[str, list[list[Chosen]]] = {name: [] for name in CASES}
        for task in tasks:
            cases = [(case_of(task, sample, methods, results), sample) for sample in task.take(limit, 0)]
            for name, of_task in found.items():
                of_task.append([Chosen(name, task, sample) for case, sample in cases if case == name])
    counts = Counter({name: sum(map(len, of_task)) for name, of_task in found.items()})
    shown: dict[tuple[str, str], Chosen] = {}
    for name, most in CASES.items():
        # tasks in turn, so that no kind of question fills the page; and each picture once
        in_turn = [one for turn in zip_longest(*found[name]) for one in turn if one is not None]
        fresh: dict[tuple[str, str], Chosen] = {}
        for one in in_turn:
            fresh.setdefault((one.task.name, one.sample.image_id or one.sample.id), one)
        shown |= dict([entry for entry in fresh.items() if entry[0] not in shown][:most])
    return list(shown.values()), counts, methods


def case_of(task: Task, sample: Sample, methods: Sequence[str], results: Results) -> str:
    """Which of CASES a question is; partly right counts as wrong."""
    full = results.of(task.name, FULL, "1.0")[sample.id]["score"] >= 1
    right = [results.of(task.name, name, str(AT))[sample.id]["score"] >= 1 for name in methods]
    if not full:
        return _WON if any(right) else _WRONG
    if all(right) or not any(right):
        return _HELD if right[0] else _LOST
    return _OTHER if right[0] else _FIRST


class _Content:
    """Examples as the page reads them; pictures, boxes and rows that several of them share are there once."""

    def __init__(self) -> None:
        self.pictures: list[str] = []
        self.boxes: list[list[list[float]]] = []
        self.rows: list[list[int]] = []

    def example(self, asker: Asker, chosen: Chosen, methods: Sequence[str], repeats: int) -> dict[str, Any]:
        """A question with its answers: `settings` is a list over KEEPS of lists over methods."""
        task, sample = chosen.task, chosen.sample
        settings, comparison = [], None
        for keep in KEEPS:
            comparison = asker.compare(
                sample.images, sample.question, methods, keep, prompt=task.prompt(sample), repeats=max(1, repeats)
            )
            by_name = {one.method: one for one in comparison.pruned}
            settings.append(
                [
                    self._answer(comparison, by_name[name], chosen, repeats, asker if keep == AT else None)
                    if name in by_name
                    else {"refused": comparison.refused[name]}
                    for name in methods
                ]
            )
        assert comparison is not None  # KEEPS is not empty
        _check_picture(comparison)
        pictures = [self._place(self.pictures, _data_url(image)) for image in comparison.images]
        parts = [
            {
                "name": part.name,
                "picture": pictures[part.image],
                "size": part.geometry.image_size,
                "rows": self._place(self.rows, list(part.rows)),
                "boxes": self._place(self.boxes, [[round(x, 2) for x in box] for box in part.geometry.boxes]),
            }
            for part in comparison.parts
        ]
        return {
            "task": task.name,
            "question": sample.question,
            "right": " or ".join(sample.accepted),
            "full": self._answer(comparison, comparison.full, chosen, repeats),
            "settings": settings,
            "parts": parts,
        }

    def _answer(
        self, comparison: Comparison, answered: Answered, chosen: Chosen, repeats: int, asker: Asker | None = None
    ) -> dict[str, Any]:
        """With an asker, also what every token is worth, which costs a forward for each."""
        full, scores = answered is comparison.full, answered.scores
        worth = [] if asker is None or answered.alone else asker.worth(comparison, answered)
        return {
            "text": answered.text,
            "score": round(chosen.task.score(answered.text, chosen.sample), 3),
            "probability": round(answered.probability, 4),
            "of_full": round(answered.of_full, 4),
            "tokens": answered.paid,
            "ms": round(1000 * sum(answered.seconds.values()), 1) if repeats else None,
            # short, as there are hundreds: bits of the mask as hexadecimal digits, worth in thousandths
            "kept": "" if full else f"{int(''.join(str(int(one)) for one in answered.kept), 2):x}",
            "scores": None if full or scores is None else [float(f"{one:.3g}") for one in scores],
            "worth": [round(1000 * one) for one in worth],
            "alone": answered.alone,
        }

    @staticmethod
    def _place(shared: list[Any], value: Any) -> int:
        if value not in shared:
            shared.append(value)
        return shared.index(value)


def _check_picture(comparison: Comparison) -> None:
    if comparison.no_picture:
        raise GripError(f"there is no picture to show: {comparison.no_picture}")


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
