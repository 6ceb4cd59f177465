"""How many rounds, how large a loss, and what is close? Writes results/rules.json.

    python -m experiments.grip_claim.rules distill-0       # trained by experiments.run; some minutes

The warm-up's scores stay as they are; its best sets are taken by other rules, on validation questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
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
from gripvlm.grip.closeness import Closeness
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import Penalty, greedy
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import REWARDS, Engine
from gripvlm.tasks import get_tasks

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
def probabilities(scorer: Scorer, work: Path, questions: int) -> list[dict[str, Any]]:
    """For each rule, the mean probability of the right answer by budget."""
    model, processor = lab.load("lab-dense")
    (task,) = get_tasks([f"jsonl:{work / 'dense-val/questions.jsonl'}"])
    samples = task.take(None, 0)
    samples = samples[:: max(1, len(samples) // questions)][:questions]
    engine = Engine(model, processor, bf16=True)
    found: list[dict[str, list[float]]] = [{budget: [] for budget in BUDGETS} for _ in RULES]
    for start in range(0, len(samples), BATCH):
        batch = engine.prepare([(task, sample) for sample in samples[start : start + BATCH]])
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        for budget in BUDGETS:
            counts = inputs.totals(torch.tensor([Budget(float(budget)).count(n) for n in batch.sizes.tolist()]))
            for values, picks in zip(found, chosen(scorer, inputs, counts), strict=True):
                member = samples_to_mask(picks, inputs.valid.shape[1])
                kept = batch.by_question(inputs.by_image([row.nonzero().flatten() for row in member]))
                rollout = engine.run(batch, range(len(batch)), kept, logits=False)
                values[budget] += REWARDS["probability"](rollout).tolist()
        print(f"{min(start + BATCH, len(samples))} of {len(samples)} questions", file=sys.stderr)
    return [
        {
            "close": what,
            "lambda": weight,
            "rounds": rounds,
            "probability": {budget: round(mean(each), 4) for budget, each in values.items()},
        }
        for (what, weight, rounds), values in zip(RULES, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder of the study, such as distill-0")
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="questions and trained scorers")
    parser.add_argument("--questions", type=int, default=320)
    given = parser.parse_args()
    content = {
        "command": f"python -m experiments.grip_claim.rules {given.run}",
        "git": git_state(),
        "hardware": hardware(),
        "questions": given.questions,
        "rules": probabilities(
            Scorer.from_pretrained(given.work / STUDY / given.run).eval(), given.work, given.questions
        ),
    }
    write_json(STUDIES / STUDY / "results" / "rules.json", content)


if __name__ == "__main__":
    main()
