"""results/grip-relaxed.json: are the relaxed baselines stuck, and where? Looks at trained arms of runs/grip_arms.sh.

    python runs/grip_relaxed.py ARMS VAL.jsonl      such as .lab/grip/arms .lab/grip/val/questions.jsonl

For each arm as it was at its last step (the best that was validated is the warm-up for many of them), budget and
validation question, the mean over questions and seeds of

- soft_first, soft_last, hard: the answer's probability under the soft mask that training sees at its first and at
  its last temperature, and under the k tokens that inference keeps;
- live_first, live_last: tokens whose soft mask has a slope (between 0.05 and 0.95), as a multiple of k: only these
  receive a gradient;
- swap_first, swap_hard: one kept token is exchanged for a dropped one, at random, and the frozen model is asked
  anew. How often does the gradient of the answer's log-probability with respect to the mask, at the soft mask of the
  first temperature and at the hard mask, tell the sign of what happens? Swaps that change the answer's
  log-probability by less than 0.02 say nothing and are left out; a coin would have 0.5.

Writes after every arm, and leaves alone what is there: remove the file to begin anew.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from last_step import last_step
from torch import Tensor

from gripvlm import lab
from gripvlm.eval import environment
from gripvlm.eval.environment import command_line
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.data import load_questions
from gripvlm.grip.train.masking import masked_forward
from gripvlm.grip.train.relaxed import FLOOR, soft_top_k
from gripvlm.grip.train.rollout import Batch, Engine
from gripvlm.models.loading import quiet
from gripvlm.pruners.base import top_k_of_each

ROOT = Path(__file__).parent.parent
KEEPS = (0.25, 0.125, 0.06, 0.03, 0.015)
ARMS = ("warmup", "soft", "soft_probability", "straight", "perturbed", "grpo")
SEEDS = (0, 1, 2)
TAU_FIRST, TAU_LAST = 1.0, 0.02
QUESTIONS, SWAPS, LEAST = 64, 8, 0.02


def log_probs(engine: Engine, batch: Batch, masks: Tensor) -> Tensor:
    """[B] log-probability of each answer under soft masks [B, n]."""
    biases = list((masks * (1 - FLOOR) + FLOOR).log())
    return masked_forward(engine, batch, biases).sum(-1)


def slope(engine: Engine, batch: Batch, masks: Tensor) -> Tensor:
    """[B, n] of the same with respect to the masks."""
    leaf = masks.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_probs(engine, batch, leaf).sum(), leaf)
    return gradient


def swapped(engine: Engine, batch: Batch, subsets: list[Tensor], n: int, random: torch.Generator) -> list[tuple]:
    """(question, kept token, dropped token, change of log-probability) of random swaps."""
    rows, kept, pairs = [], [], []
    for b, subset in enumerate(subsets):
        inside = torch.zeros(n, dtype=torch.bool).index_fill(0, subset, True)
        dropped = (~inside).nonzero().flatten()
        for _ in range(SWAPS):
            out = subset[torch.randint(len(subset), (1,), generator=random)]
            into = dropped[torch.randint(len(dropped), (1,), generator=random)]
            new = inside.clone()
            new[out], new[into] = False, True
            rows.append(b)
            kept.append([new.nonzero().flatten()])
            pairs.append((b, int(out), int(into)))
    before = engine.run(batch, range(len(batch)), [[subset] for subset in subsets]).log_probs.sum(-1)
    after = engine.run(batch, rows, kept).log_probs.sum(-1)
    return [(*pair, float(value - before[pair[0]])) for pair, value in zip(pairs, after, strict=True)]


def look(engine: Engine, batches: list[Batch], scorer: Scorer, random: torch.Generator) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {str(keep): defaultdict(list) for keep in KEEPS}
    for batch in batches:
        seen = batch.for_scorer(scorer.config.question)
        for keep in KEEPS:
            one = found[str(keep)]
            kept = (keep * seen.sizes).round().long().clamp(min=1)
            with torch.no_grad():
                scores = seen.score(scorer, kept)
                first, last = (soft_top_k(scores, kept, tau) for tau in (TAU_FIRST, TAU_LAST))
            subsets = top_k_of_each(scores, kept.tolist())
            hard = torch.stack([torch.zeros(scores.shape[1]).index_fill(0, subset, 1.0) for subset in subsets])
            for name, mask in (("first", first), ("last", last)):
                with torch.no_grad():
                    one[f"soft_{name}"] += log_probs(engine, batch, mask).exp().tolist()
                live = (mask > 0.05) & (mask < 0.95)
                one[f"live_{name}"] += (live.sum(-1) / kept).tolist()
            rollout = engine.run(batch, range(len(batch)), [[subset] for subset in subsets])
            one["hard"] += rollout.log_probs.sum(-1).exp().tolist()
            slopes = {"first": slope(engine, batch, first), "hard": slope(engine, batch, hard)}
            for b, out, into, change in swapped(engine, batch, subsets, scores.shape[1], random):
                if abs(change) >= LEAST:
                    one["telling"].append(1.0)
                    for name, gradient in slopes.items():
                        one[f"swap_{name}"].append(float((gradient[b, into] > gradient[b, out]) == (change > 0)))
                else:
                    one["telling"].append(0.0)
    return {keep: {name: sum(v) / len(v) for name, v in one.items()} for keep, one in found.items()}


def main() -> None:
    quiet()
    folder, questions = Path(sys.argv[1]), load_questions(sys.argv[2])
    model, processor = lab.load()
    engine = Engine(model, processor)
    some = questions[:: len(questions) // QUESTIONS][:QUESTIONS]
    batches = [engine.prepare(some[start : start + 16]) for start in range(0, len(some), 16)]
    file = ROOT / "results" / "grip-relaxed.json"
    arms: dict[str, dict] = json.loads(file.read_text())["arms"] if file.exists() else {}
    for arm in ARMS:
        if arm in arms:
            continue
        seeds = [
            look(engine, batches, last_step(folder / f"{arm}-{seed}"), torch.Generator().manual_seed(0))
            for seed in SEEDS
        ]
        arms[arm] = {keep: {name: [seed[keep][name] for seed in seeds] for name in seeds[0][keep]} for keep in seeds[0]}
        result = {
            "command": command_line(),
            **environment(),
            "taus": [TAU_FIRST, TAU_LAST],
            "weights": "last step",
            "questions": len(some),
            "swaps_a_question": SWAPS,
            "arms": arms,
        }
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(arm)


if __name__ == "__main__":
    main()
