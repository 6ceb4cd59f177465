"""Which families of `lab-dense` can tell pruners apart? Measured on validation boards, before any trained pruner.

PYTHONPATH=examples python -m lab_dense.dataset WORK/val --split val --groups 150 80 40
python -m experiments.lab_dense.admit WORK --shard 1/2 & python -m experiments.lab_dense.admit WORK --shard 2/2; wait
python -m experiments.lab_dense.admit WORK          # writes results/admission/; analyze.py judges
"""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path

from experiments.results import STUDIES, split
from gripvlm import lab
from gripvlm.eval import evaluate
from gripvlm.tasks.base import Sample
from gripvlm.tasks.jsonl import JsonlTask

PRUNERS = ("full", "oracle", "random", "grid", "pool", "norm", "mmr(norm)")
BUDGETS = (0.25, 0.125, 0.06)


class FamilyTask(JsonlTask):
    """One family of a file's questions."""

    max_new_tokens = 12

    def __init__(self, path: Path, family: str):
        super().__init__(path, name=f"lab-dense/{family}")
        self.family = family

    @cached_property
    def samples(self) -> tuple[Sample, ...]:  # type: ignore[override]
        return tuple(sample for sample in super().samples if sample.family == self.family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="holds val/, the validation questions; answers are kept there")
    parser.add_argument("--model", help="a folder, in place of the lab-dense that ships")
    parser.add_argument("--limit", type=int, default=150, help="questions a family")
    parser.add_argument("--shard", help="1/2: the first half only, so that two processes share the work")
    given = parser.parse_args()
    file = given.work / "val" / "questions.jsonl"
    if given.model:
        from gripvlm.models.loading import load_model

        model, processor = load_model(given.model, "cpu")
    else:
        model, processor = lab.load("lab-dense")
    families = {json.loads(line)["family"]: None for line in file.read_text().splitlines()}
    tasks = [FamilyTask(file, family) for family in families]
    out = given.work / "admission.json"
    evaluate(
        *(model, processor, tasks, PRUNERS, BUDGETS),
        **{
            "limit": given.limit,
            "batch_size": 16,
            "model_name": "lab-dense",
            "out": out,
            "progress": True,
            "shard": given.shard,
        },
        command=f"python -m experiments.lab_dense.admit WORK --limit {given.limit}",
    )
    if given.shard is None:
        split(out, STUDIES / "lab_dense" / "results" / "admission", {"study": "lab_dense"})


if __name__ == "__main__":
    main()
