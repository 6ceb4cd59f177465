"""The lab's six families of questions, on the rendered sample of the test split that ships with the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, Task, TaskError, named_choice
from gripvlm.tasks.jsonl import read_samples
from gripvlm.tasks.metrics import pair_accuracy, yes_no_summary

__all__ = ["FAMILIES", "SAMPLE", "LabTask"]

FAMILIES = ("existence", "perception", "science", "diagram", "reading", "text")
SAMPLE = Path(__file__).parents[1] / "lab" / "data" / "sample"
"""The folder with `questions.jsonl` and `images/`."""


class LabTask(Task):
    """One family of the lab's questions.

    existence mirrors POPE, perception MME, science ScienceQA, diagram AI2D, reading OCRBench and text TextVQA. Lab
    scores are never comparable with theirs.
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
            raise TaskError(f"the lab's sample is not in this installation ({file}): install gripvlm again")
        read = read_samples(file, self.folder / "images", grid=self.evidence_grid)
        samples = tuple(sample for sample in read if sample.family == self.family)
        if not samples:
            raise TaskError(f"{file} has no question of the family {self.family!r}")
        return samples

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """existence: F1, precision, recall, yes_share; perception: accuracy_plus."""
        answered = self.with_samples(records)
        if self.family == "existence":
            predicted = [named_choice(record["prediction"], ("yes", "no")) == "yes" for record, _ in answered]
            return yes_no_summary(predicted, [sample.answer == "yes" for _, sample in answered])
        if self.family == "perception":
            pairs: dict[tuple[str, str], list[float]] = {}
            for record, sample in answered:
                # Only some of the questions come in pairs.
                if sample.pair is not None:
                    pairs.setdefault((sample.image_id, sample.pair), []).append(record["score"])
            return pair_accuracy(pairs.values())
        return {}
