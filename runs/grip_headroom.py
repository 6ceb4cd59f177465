"""results/grip-headroom.json: what is there to win at each budget, on validation questions of the lab.

    python runs/grip_headroom.py VAL.jsonl [SCORER ...]

The mean probability of the right answer (and the share of questions where it is the model's first choice) with all
tokens, with each scorer's choice, and under the oracle: the question's own evidence first, then tokens at random. And,
on the first questions, `spread`: how much that probability differs (standard deviation) between the subsets that a
scorer's Plackett-Luce law draws for one question, which is what GRPO learns from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.eval import environment
from gripvlm.eval.environment import command_line
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.pruner import SHIPPED
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.data import load_questions
from gripvlm.grip.train.rewards import probability
from gripvlm.grip.train.rollout import Batch, Engine
from gripvlm.grip.train.validation import Validator
from gripvlm.models.loading import quiet
from gripvlm.pruners.base import top_k

ROOT = Path(__file__).parent.parent
KEEPS, QUESTIONS = (0.5, 0.25, 0.125, 0.06, 0.03, 0.015), 640
BATCHES, DRAWS = 3, 16  # of 32 questions, and subsets a question, for the spread


def evidence(batch: Batch, keep: float) -> list[list[Tensor]]:
    """[B][1] the oracle's choice."""
    found = []
    for sample, (tokens,) in zip(batch.samples, batch.tokens, strict=True):
        worth = torch.rand(tokens.n) / 2
        worth[list(sample.evidence)] += 1
        found.append([top_k(worth, Budget(keep).count(tokens.n))])
    return found


def spread(engine: Engine, batches: list[Batch], scorer: Scorer, keep: float) -> float:
    """Mean over questions of the reward's standard deviation between drawn subsets."""
    found = []
    for batch in batches:
        seen = batch.for_scorer(scorer.config.question)
        kept = torch.tensor([Budget(keep).count(n) for n in seen.sizes.tolist()])
        with torch.no_grad():
            picks = PlackettLuce(seen.score(scorer, kept), kept, seen.valid).sample(DRAWS)
        rows = [sample for sample in range(len(batch)) for _ in range(DRAWS)]
        subsets = [[one[one >= 0].sort().values] for mine in picks for one in mine]
        found.append(probability(engine.run(batch, rows, subsets)).view(-1, DRAWS).std(-1))
    return float(torch.cat(found).mean())


def main() -> None:
    quiet()
    torch.manual_seed(0)
    engine = Engine(*lab.load())
    questions = load_questions(sys.argv[1])[:QUESTIONS]
    validator = Validator(engine, questions, KEEPS, probability)
    scorers = {"shipped": SHIPPED / "question"} | {Path(name).name: Path(name) for name in sys.argv[2:]}
    found: dict[str, Any] = {name: validator.judge(Scorer.from_pretrained(path)) for name, path in scorers.items()}
    some = (validator.batches or [])[:BATCHES]
    for name, path in scorers.items():
        scorer = Scorer.from_pretrained(path)
        found[name] |= {f"spread@{keep:g}": spread(engine, some, scorer, keep) for keep in KEEPS}
    sums: dict[str, Tensor] = {}
    for batch in validator.batches or []:
        choices = {"full": batch.everything} | {f"{keep:g}": evidence(batch, keep) for keep in KEEPS}
        for name, kept in choices.items():
            rollout = engine.run(batch, range(len(batch)), kept)
            both = torch.stack((probability(rollout).sum(), rollout.exact.sum()))
            sums[name] = sums.get(name, 0.0) + both / len(questions)
    reward, exact = sums.pop("full").tolist()
    found["full"] = {"reward": reward, "exact": exact}
    found["oracle"] = {
        f"{what}@{keep}": value
        for keep, both in sums.items()
        for what, value in zip(("reward", "exact"), both.tolist(), strict=True)
    }
    result = {"command": command_line(), **environment(), "questions": len(questions), "keeps": KEEPS, "judged": found}
    (ROOT / "results" / "grip-headroom.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
