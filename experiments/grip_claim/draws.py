"""Does a scorer's best set do as well as its draws? Writes results/draws.json.

python -m experiments.grip_claim.draws distill-0 grpo-0       # trained by experiments.run; minutes
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.grip_claim import validation
from experiments.grip_claim.validation import BUDGETS
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.policies import policy_of

TEMPERATURES = (0.0, 0.25, 0.5, 1.0)
"""0: the best set."""
DRAWS = 2


@torch.no_grad()
def measure(runs: list[Path], work: Path, questions: int) -> dict[str, Any]:
    """Scorer -> temperature -> budget -> the mean probability of the right answer over questions and draws."""
    scorers = {run.name: Scorer.from_pretrained(run).eval() for run in runs}
    random = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        name: {str(tau): {budget: [] for budget in BUDGETS} for tau in TEMPERATURES} for name in scorers
    }
    for engine, batch in validation.batches(work, questions):
        for name, scorer in scorers.items():
            inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
            for budget in BUDGETS:
                counts = validation.counts_of(batch, inputs, budget)
                for tau in TEMPERATURES:
                    policy = policy_of(scorer, inputs, counts, tau or 1.0)
                    samples = policy.sample(DRAWS, generator=random) if tau else policy.mode()[:, None]
                    for draw in samples_to_mask(samples, inputs.valid.shape[1]).unbind(1):
                        found[name][str(tau)][budget] += validation.probability(engine, batch, inputs, draw)
    means = {
        name: {tau: {budget: round(mean(each), 4) for budget, each in rows.items()} for tau, rows in by_tau.items()}
        for name, by_tau in found.items()
    }
    return {"draws": DRAWS, "probability": means}


if __name__ == "__main__":
    validation.main("draws", __doc__, measure)
