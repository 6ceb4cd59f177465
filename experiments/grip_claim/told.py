"""Does a scorer use its budget? Writes results/told.json.

    python -m experiments.grip_claim.told grpo-0       # trained by experiments.run; some minutes

k tokens are kept, and the scorer reads another budget than k / n; validation questions.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from experiments.grip_claim import validation
from experiments.grip_claim.validation import BUDGETS
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import greedy
from gripvlm.grip.scorer import Scorer


def member(scorer: Scorer, inputs: ScorerInputs, counts: Tensor, share: float) -> Tensor:
    """bool [S, n] the `counts` [S] tokens that a scorer keeps which reads the budget `share`."""
    read = share * inputs.sizes
    picks = greedy(inputs.score(scorer, read), counts, int(counts.max()), inputs.penalty(scorer, read))
    return samples_to_mask(picks, inputs.valid.shape[1])


@torch.no_grad()
def measure(runs: list[Path], work: Path, questions: int) -> dict[str, Any]:
    """Kept budget -> budget that is read -> the mean probability of the right answer, and how much of the set stays."""
    (run,) = runs
    scorer = Scorer.from_pretrained(run).eval()
    found: dict[str, Any] = {kept: {read: {"probability": [], "shared": []} for read in BUDGETS} for kept in BUDGETS}
    for engine, batch in validation.batches(work, questions):
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        for kept in BUDGETS:
            counts = validation.counts_of(batch, inputs, kept)
            own = member(scorer, inputs, counts, float(kept))
            for read in BUDGETS:
                chosen = member(scorer, inputs, counts, float(read))
                found[kept][read]["probability"] += validation.probability(engine, batch, inputs, chosen)
                found[kept][read]["shared"] += ((own & chosen).sum(-1) / counts).tolist()
    means = {
        kept: {read: {name: round(mean(values), 4) for name, values in each.items()} for read, each in by_read.items()}
        for kept, by_read in found.items()
    }
    return {"found": means}


if __name__ == "__main__":
    validation.main("told", __doc__, measure)
