"""The lab's six families, on the rendered sample of the test split that ships with the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, Task, TaskError, named_choice
from gripvlm.tasks.jsonl import read_samples
from gripvlm.tasks.metrics import yes_no_summary

__all__ = ["FAMILIES", "SAMPLE", "LabTask"]

FAMILIES = ("existence", "perception", "science", "diagram", "reading", "text")
SAMPLE = Path(__file__).parents[1] / "lab" / "data" / "sample"
"""The folder with `questions.jsonl` and `images/`."""


class LabTask(Task):
    """One family of the lab.

    existence mirrors POPE, perception MME, science ScienceQA, diagram AI2D, reading OCRBench and
    text TextVQA; lab scores are never comparable with theirs.
    """

    max_new_tokens = 12
    evidence_grid = (16, 16)

    def __init__(self, family: str, folder: Path | None = None) -> None:
        self.family = family
        self.name = f"lab/{family}"
        self.folder = folder or SAMPLE

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        file = self.folder / "questions.jsonl"
        if not file.exists():
            raise TaskError(f"the lab's sample is not in this installation ({file}): install gripvlm anew")
        mine = [one for one in read_samples(file, self.folder / "images") if one.family == self.family]
        if not mine:
            raise TaskError(f"{file} has no question of the family {self.family!r}")
        return tuple(mine)

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """existence: F1, precision, recall, yes_share; perception: accuracy_plus."""
        by_id = {sample.id: sample for sample in self.samples}
        pairs = [(record, by_id[record["id"]]) for record in records]
        if self.family == "existence":
            said = [named_choice(record["prediction"], ("yes", "no")) == "yes" for record, _ in pairs]
            return yes_no_summary(said, [sample.answer == "yes" for _, sample in pairs])
        if self.family == "perception":
            return _both_of_a_pair(pairs)
        return {}


def _both_of_a_pair(pairs: list[tuple[Mapping[str, Any], Sample]]) -> dict[str, float]:
    """The share of pairs whose two questions are both right; lone questions don't count."""
    together: dict[tuple[str, str], list[float]] = {}
    for record, sample in pairs:
        if sample.pair is not None:
            together.setdefault((sample.image_id, sample.pair), []).append(record["score"])
    whole = [scores for scores in together.values() if len(scores) == 2]
    return {"accuracy_plus": sum(min(s) for s in whole) / len(whole)} if whole else {}
