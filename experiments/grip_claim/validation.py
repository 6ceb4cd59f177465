"""Validation questions of `lab-dense`, for what is asked of scorers that are trained already."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.results import ROOT, STUDIES, write_json
from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.eval.environment import git_state, hardware
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.train import REWARDS, Batch, Engine
from gripvlm.tasks import get_tasks

STUDY = "grip_claim"
BUDGETS = ("0.25", "0.125", "0.06", "0.03")
BATCH = 16


def batches(work: Path, questions: int) -> Iterator[tuple[Engine, Batch]]:
    """About as many questions, evenly from the file, in batches."""
    model, processor = lab.load("lab-dense")
    (task,) = get_tasks([f"jsonl:{work / 'dense-val/questions.jsonl'}"])
    samples = task.take(None, 0)
    samples = samples[:: max(1, len(samples) // questions)][:questions]
    engine = Engine(model, processor, bf16=True)
    for start in range(0, len(samples), BATCH):
        yield engine, engine.prepare([(task, sample) for sample in samples[start : start + BATCH]])
        print(f"{min(start + BATCH, len(samples))} of {len(samples)} questions", file=sys.stderr)


def counts_of(batch: Batch, inputs: ScorerInputs, budget: str) -> Tensor:
    """[S] tokens that each sequence keeps."""
    return inputs.totals(torch.tensor([Budget(float(budget)).count(n) for n in batch.sizes.tolist()]))


def probability(engine: Engine, batch: Batch, inputs: ScorerInputs, member: Tensor) -> list[float]:
    """Of the right answer to each question, with the tokens member [S, n]."""
    kept = batch.by_question(inputs.by_image([row.nonzero().flatten() for row in member]))
    rewards: list[float] = REWARDS["probability"](engine.run(batch, range(len(batch)), kept, logits=False)).tolist()
    return rewards


def main(name: str, description: str | None, measure: Callable[[list[Path], Path, int], dict[str, Any]]) -> None:
    """The command; writes results/<name>.json.

    Args:
        measure: (folders of scorers, the work folder, questions) -> what the file holds besides its circumstances.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of the study, such as grpo-0")
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="questions and trained scorers")
    parser.add_argument("--questions", type=int, default=320)
    given = parser.parse_args()
    content = {
        "command": f"python -m experiments.grip_claim.{name} {' '.join(given.runs)}",
        "git": git_state(),
        "hardware": hardware(),
        "questions": given.questions,
    }
    content |= measure([given.work / STUDY / run for run in given.runs], given.work, given.questions)
    write_json(STUDIES / STUDY / "results" / f"{name}.json", content)
