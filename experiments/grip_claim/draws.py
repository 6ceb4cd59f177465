"""Does a scorer's best set do as well as its draws? Writes results/draws.json.

python -m experiments.grip_claim.draws distill-0 grpo-0 soft_topk-0       # trained by experiments.run; minutes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.results import ROOT, STUDIES, write_json
from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.eval.environment import git_state, hardware
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import REWARDS, Engine
from gripvlm.grip.train.policies import policy_of
from gripvlm.tasks import get_tasks

STUDY = "grip_claim"
BUDGETS = ("0.25", "0.125", "0.06", "0.03")
TEMPERATURES = (0.0, 0.25, 0.5, 1.0)
"""0: the best set."""
DRAWS, BATCH = 2, 16


@torch.no_grad()
def probabilities(scorers: dict[str, Scorer], work: Path, questions: int) -> dict[str, Any]:
    """Scorer -> temperature -> budget -> the mean probability of the right answer over questions and draws."""
    model, processor = lab.load("lab-dense")
    (task,) = get_tasks([f"jsonl:{work / 'dense-val/questions.jsonl'}"])
    samples = task.take(None, 0)
    samples = samples[:: max(1, len(samples) // questions)][:questions]
    engine, random = Engine(model, processor, bf16=True), torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        name: {str(tau): {budget: [] for budget in BUDGETS} for tau in TEMPERATURES} for name in scorers
    }
    for start in range(0, len(samples), BATCH):
        batch = engine.prepare([(task, sample) for sample in samples[start : start + BATCH]])
        for name, scorer in scorers.items():
            inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
            for budget in BUDGETS:
                counts = inputs.totals(torch.tensor([Budget(float(budget)).count(n) for n in batch.sizes.tolist()]))
                for tau in TEMPERATURES:
                    policy = policy_of(scorer, inputs, counts, tau or 1.0)
                    samples_of = policy.sample(DRAWS, generator=random) if tau else policy.mode()[:, None]
                    member = samples_to_mask(samples_of, inputs.valid.shape[1])
                    for draw in member.unbind(1):
                        kept = batch.by_question(inputs.by_image([row.nonzero().flatten() for row in draw]))
                        rollout = engine.run(batch, range(len(batch)), kept, logits=False)
                        found[name][str(tau)][budget] += REWARDS["probability"](rollout).tolist()
        print(f"{min(start + BATCH, len(samples))} of {len(samples)} questions", file=sys.stderr)
    return {
        name: {tau: {budget: round(mean(each), 4) for budget, each in rows.items()} for tau, rows in by_tau.items()}
        for name, by_tau in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of the study, such as grpo-0")
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="questions and trained scorers")
    parser.add_argument("--questions", type=int, default=320)
    given = parser.parse_args()
    scorers = {name: Scorer.from_pretrained(given.work / STUDY / name).eval() for name in given.runs}
    content = {
        "command": f"python -m experiments.grip_claim.draws {' '.join(given.runs)}",
        "git": git_state(),
        "hardware": hardware(),
        "questions": given.questions,
        "draws": DRAWS,
        "probability": probabilities(scorers, given.work, given.questions),
    }
    write_json(STUDIES / STUDY / "results" / "draws.json", content)


if __name__ == "__main__":
    main()
