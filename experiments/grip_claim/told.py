"""Does a scorer use its budget? Writes results/told.json.

    python -m experiments.grip_claim.told grpo-0       # trained by experiments.run; some minutes

k tokens are kept, and the scorer reads another budget than k / n; validation questions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from experiments.grip_claim.draws import BATCH, BUDGETS, STUDY
from experiments.results import ROOT, STUDIES, write_json
from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.eval.environment import git_state, hardware
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import greedy
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import REWARDS, Engine
from gripvlm.tasks import get_tasks


def member(scorer: Scorer, inputs: ScorerInputs, counts: Tensor, share: float) -> Tensor:
    """bool [S, n] the `counts` [S] tokens that a scorer keeps which reads the budget `share`."""
    read = share * inputs.sizes
    picks = greedy(inputs.score(scorer, read), counts, int(counts.max()), inputs.penalty(scorer, read))
    return samples_to_mask(picks, inputs.valid.shape[1])


@torch.no_grad()
def measure(scorer: Scorer, work: Path, questions: int) -> dict[str, Any]:
    """Kept budget -> budget that is read -> the mean probability of the right answer, and how much of the set stays."""
    model, processor = lab.load("lab-dense")
    (task,) = get_tasks([f"jsonl:{work / 'dense-val/questions.jsonl'}"])
    samples = task.take(None, 0)
    samples = samples[:: max(1, len(samples) // questions)][:questions]
    engine = Engine(model, processor, bf16=True)
    found: dict[str, Any] = {kept: {read: {"probability": [], "shared": []} for read in BUDGETS} for kept in BUDGETS}
    for start in range(0, len(samples), BATCH):
        batch = engine.prepare([(task, sample) for sample in samples[start : start + BATCH]])
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        for kept in BUDGETS:
            counts = inputs.totals(torch.tensor([Budget(float(kept)).count(n) for n in batch.sizes.tolist()]))
            own = member(scorer, inputs, counts, float(kept))
            for read in BUDGETS:
                chosen = member(scorer, inputs, counts, float(read))
                rows = batch.by_question(inputs.by_image([row.nonzero().flatten() for row in chosen]))
                rollout = engine.run(batch, range(len(batch)), rows, logits=False)
                found[kept][read]["probability"] += REWARDS["probability"](rollout).tolist()
                found[kept][read]["shared"] += ((own & chosen).sum(-1) / counts).tolist()
        print(f"{min(start + BATCH, len(samples))} of {len(samples)} questions", file=sys.stderr)
    return {
        kept: {read: {name: round(mean(values), 4) for name, values in each.items()} for read, each in by_read.items()}
        for kept, by_read in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder of the study, such as grpo-0")
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="questions and trained scorers")
    parser.add_argument("--questions", type=int, default=320)
    given = parser.parse_args()
    content = {
        "command": f"python -m experiments.grip_claim.told {given.run}",
        "git": git_state(),
        "hardware": hardware(),
        "questions": given.questions,
        "found": measure(Scorer.from_pretrained(given.work / STUDY / given.run).eval(), given.work, given.questions),
    }
    write_json(STUDIES / STUDY / "results" / "told.json", content)


if __name__ == "__main__":
    main()
