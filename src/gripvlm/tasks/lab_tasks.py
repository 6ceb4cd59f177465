"""The labs' families of questions, on the rendered samples of their test splits that ship with the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, Task, TaskError, named_choice
from gripvlm.tasks.jsonl import read_samples
from gripvlm.tasks.metrics import pair_accuracy, yes_no_summary

__all__ = ["FAMILIES", "SAMPLES", "LabTask", "dense_families"]

FAMILIES = ("existence", "perception", "science", "diagram", "reading", "text")
"""Of the lab `lab`; those of `lab-dense` are what the rows of its sample say."""
_DATA = Path(__file__).parents[1] / "lab" / "data"
SAMPLES = {"lab": _DATA / "sample", "lab-dense": _DATA / "dense" / "sample"}
"""Lab -> the folder with `questions.jsonl` and `images/`."""


def dense_families() -> list[str]:
    """The families of `lab-dense`, in the order of its rows.

    Raises:
        TaskError: its sample is not in this installation.
    """
    return list(dict.fromkeys(sample.family for sample in _read("lab-dense", SAMPLES["lab-dense"])))


def _read(lab: str, folder: Path) -> list[Sample]:
    file = folder / "questions.jsonl"
    if not file.exists():
        raise TaskError(
            f"the questions of {lab} are not in this installation ({file}): install gripvlm from a clone "
            "(pip install -e .), or use other tasks"
        )
    return read_samples(file, folder / "images", grid=LabTask.evidence_grid)


class LabTask(Task):
    """One family of a lab's questions.

    In `lab`, existence mirrors POPE, perception MME, science ScienceQA, diagram AI2D, reading OCRBench and text
    TextVQA. Lab scores are never comparable with theirs.
    """

    max_new_tokens = 12
    evidence_grid = (16, 16)

    def __init__(self, family: str, folder: Path | None = None, lab: str = "lab") -> None:
        self.family, self.lab = family, lab
        self.name = f"{lab}/{family}"
        self.folder = folder or SAMPLES[lab]

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        read = _read(self.lab, self.folder)
        samples = tuple(sample for sample in read if sample.family == self.family)
        if not samples:
            raise TaskError(
                f"{self.lab} has no family of questions {self.family!r}: use one of "
                f"{', '.join(dict.fromkeys(sample.family for sample in read))}"
            )
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
