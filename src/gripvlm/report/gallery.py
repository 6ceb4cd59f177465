"""Pictures of what was kept for chosen questions: those that a method loses come first."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gripvlm.errors import GripError
from gripvlm.eval.records import unpack_masks
from gripvlm.eval.results import Results
from gripvlm.eval.variants import FULL, ORACLE
from gripvlm.report.blocks import Block, Heading, Pictures, Shown, Text
from gripvlm.report.picture import overlay
from gripvlm.report.points import Comparison, Point, keep_text
from gripvlm.report.tables import short
from gripvlm.report.tiles import layout
from gripvlm.tasks import Sample, get_tasks

__all__ = ["choose", "gallery"]

SIDE = 400
FAILURES, SUCCESSES = 6, 3


@dataclass(frozen=True)
class Choice:
    """One question to show."""

    task: str
    id: str
    failed: bool


def gallery(comparison: Comparison, anchor: str) -> list[Block]:
    """What the best method, random and grid kept, at the budget nearest to a tenth.

    Questions that the full model answers better than the best method come first, tasks in turn; then
    some that only the best gets right. The page says why where there are none.
    """
    title = Heading(f"What was kept: {comparison.name}", 3)
    keep = comparison.nearest()
    shown = _methods(comparison, keep)
    if comparison.scores is None:
        return [title, Text("Pictures are left out: there are no answers to choose from.")]
    chosen = choose(comparison, shown, keep) if shown else []
    if shown and not chosen:
        return [title, Text("Pictures are left out: no question tells these methods from the full model.")]
    if not shown:
        return [
            title,
            Text(
                "Pictures are left out: these results do not record which tokens were kept (runs before this was "
                "recorded, or methods that drop inside the language model). Run the evaluation again to see them."
            ),
        ]
    try:
        processor = _processor(comparison.results[0])
        specs = comparison.results[0].task_specs
        samples = {
            (task.name, sample.id): sample
            for task in get_tasks([specs[name] for name in dict.fromkeys(one.task for one in chosen)])
            for sample in task.samples
        }
        questions = [_question(comparison, one, samples[one.task, one.id], shown, processor, anchor) for one in chosen]
    except (GripError, OSError, KeyError) as error:
        return [title, Text(f"Pictures are left out: {' '.join(str(error).split())}")]
    lost = sum(one.failed for one in chosen)
    names = ", ".join(f"`{p.method}`" for p in shown)
    text = (
        f"{names} at {keep_text(shown[0].keep)}: bright patches were kept. First {lost} questions that the full model "
        f"answers better than `{shown[0].method}`, tasks in turn; then {len(chosen) - lost} that it gets right and "
        f"`{shown[-1].method}` not. Chosen by this rule, not by eye. A blue bar is a right "
        "answer, an orange one a wrong or partly right answer."
    )
    return [title, Text(text), *questions]


def _methods(comparison: Comparison, keep: Any) -> list[Point]:
    """The most accurate at this budget whose answers say what was kept, then random and grid where they were measured.

    Methods that drop inside the language model keep other tokens at each layer, of which there is no one picture.
    """
    if comparison.scores is None:
        return []
    there = {p.method: p for p in comparison.points if p.keep == keep and not p.full and _has_masks(comparison, p)}
    able = [p for name, p in there.items() if name not in (ORACLE, "random", "grid")]
    best = sorted(able, key=lambda p: -p.mean.value)[:1]
    return [*best, *(there[name] for name in ("random", "grid") if name in there)]


def _has_masks(comparison: Comparison, point: Point) -> bool:
    return all("kept" in record for task in comparison.tasks for record in _records(comparison, point, task).values())


def _records(comparison: Comparison, point: Point, task: str) -> dict[str, dict[str, Any]]:
    """The answers of a point; of its first seed where it has several."""
    assert comparison.scores is not None
    if point.full:
        return comparison.results[0].of(task, FULL, "1.0")
    setting = comparison.scores.settings[comparison.scores.index(point.method, point.keep) or 0]
    return comparison.results[point.file].of(task, setting.labels[0], str(point.keep))


def choose(comparison: Comparison, shown: Sequence[Point], keep: Any) -> list[Choice]:
    """Failures of the first method first, tasks in turn, then successes where the second one fails."""
    full = next(p for p in comparison.points if p.full)
    lost: dict[str, list[Choice]] = {}
    won: dict[str, list[Choice]] = {}
    for task in comparison.tasks:
        whole, best = _records(comparison, full, task), _records(comparison, shown[0], task)
        other = _records(comparison, shown[-1], task)
        for name, record in best.items():
            if record["score"] < whole[name]["score"]:
                lost.setdefault(task, []).append(Choice(task, name, True))
            elif record["score"] >= 1 and (len(shown) == 1 or other[name]["score"] < 1):
                won.setdefault(task, []).append(Choice(task, name, False))
    return [*_in_turn(lost, FAILURES), *_in_turn(won, SUCCESSES)]


def _in_turn(by_task: dict[str, list[Choice]], count: int) -> list[Choice]:
    longest = max(map(len, by_task.values()), default=0)
    return [mine[i] for i in range(longest) for mine in by_task.values() if i < len(mine)][:count]


def _processor(one: Results) -> Any:
    name = one.header["model"]
    if name == "lab":
        from gripvlm import lab

        return lab.load()[1]
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise GripError(f"the processor of {name} cannot be loaded here ({str(error).splitlines()[0]})") from None


def _question(
    comparison: Comparison, one: Choice, sample: Sample, shown: Sequence[Point], processor: Any, anchor: str
) -> Pictures:
    full = next(p for p in comparison.points if p.full)
    whole = _records(comparison, full, one.task)[one.id]["prediction"]
    picture, drawn = sample.image, []
    for point in shown:
        record = _records(comparison, point, one.task)[one.id]
        items = unpack_masks(record["kept"])
        for part in layout(processor, picture.size, [item.grid for item in items]):
            image = overlay(picture, part.of(items), part.geometry, caption="")
            right = record["score"] >= 1
            said = f"{record['prediction'] or '(nothing)'} ({_judged(record['score'])})"
            caption = f"{point.method}, {record['k']} of {record['n']} tokens: {said}"
            name = "-".join(filter(None, [anchor, short(one.task), one.id, point.method, part.name]))
            drawn.append(Shown(_safe(name), _jpeg(image), f"{caption} {part.name}".strip(), right))
    return Pictures(f"{short(one.task)}: {sample.question} True answer: {sample.answer}. Full model: {whole}.", drawn)


def _judged(score: float) -> str:
    """In a word; VQA scores and the like are also between wrong and right."""
    return "right" if score >= 1 else "wrong" if score <= 0 else f"partly right, {score:.2g}"


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in name)


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=82)
    return kept.getvalue()
