"""How many rounds, how large a loss, and what is close? Writes results/rules.json.

    python -m experiments.grip_claim.rules distill-0       # trained by experiments.run; some minutes

The warm-up's scores stay as they are; its best sets are taken by other rules, on validation questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from experiments.grip_claim import validation
from experiments.grip_claim.validation import BUDGETS
from gripvlm.grip.closeness import Closeness
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import Penalty, greedy
from gripvlm.grip.scorer import Scorer

RULES = [
    *(("both", 4.0, rounds) for rounds in (1, 2, 4, 8, 16, 32, 256)),
    *(("both", weight, 16) for weight in (2.0, 6.0, 8.0)),
    *((what, weight, 16) for what in ("features", "places") for weight in (2.0, 4.0)),
]
"""What is close, lambda, rounds; with 256 rounds tokens are chosen one by one."""


def close(inputs: ScorerInputs, what: str) -> tuple[Closeness, float]:
    """The closeness, or one of its terms alone and the factor that gives it all the weight."""
    if what == "features":
        return Closeness(inputs.features, inputs.cells * 1e6, inputs.images), 2  # all others are far away
    if what == "places":
        return Closeness(torch.zeros_like(inputs.features), inputs.cells, inputs.images), 2
    return inputs.close, 1


def chosen(scorer: Scorer, inputs: ScorerInputs, counts: Tensor) -> Iterator[Tensor]:
    """[S, K] what each rule keeps."""
    logits = inputs.score(scorer, counts)
    for what, weight, rounds in RULES:
        closeness, factor = close(inputs, what)
        penalty = Penalty(rounds, torch.full((len(counts),), factor * weight), closeness)
        yield greedy(logits, counts, int(counts.max()), penalty)


@torch.no_grad()
def measure(runs: list[Path], work: Path, questions: int) -> dict[str, Any]:
    """For each rule, the mean probability of the right answer by budget."""
    (run,) = runs
    scorer = Scorer.from_pretrained(run).eval()
    found: list[dict[str, list[float]]] = [{budget: [] for budget in BUDGETS} for _ in RULES]
    for engine, batch in validation.batches(work, questions):
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        for budget in BUDGETS:
            counts = validation.counts_of(batch, inputs, budget)
            for values, picks in zip(found, chosen(scorer, inputs, counts), strict=True):
                member = samples_to_mask(picks, inputs.valid.shape[1])
                values[budget] += validation.probability(engine, batch, inputs, member)
    rules = [
        {
            "close": what,
            "lambda": weight,
            "rounds": rounds,
            "probability": {budget: round(mean(each), 4) for budget, each in values.items()},
        }
        for (what, weight, rounds), values in zip(RULES, found, strict=True)
    ]
    return {"rules": rules}


if __name__ == "__main__":
    validation.main("rules", __doc__, measure)
