"""Puts trained scorers for the lab VLM into the package, in half precision: question/ and blind/.

    python runs/ship_grip.py WORK       such as .lab/grip

`question` is the mean of the weights of both legs of GRPO, WORK/first and WORK/question: on the validation split it is
better than either at every budget (docs/log.md).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from gripvlm import lab
from gripvlm.pruners.grip import SHIPPED
from gripvlm.scorer import BaseModel, Scorer

LEGS = {"question": ("first", "question"), "blind": ("blind",)}


def mean(folders: list[Path]) -> Scorer:
    """A scorer with the mean of several scorers' weights, and the last one's notes."""
    scorers = [Scorer.from_pretrained(folder) for folder in folders]
    states = [scorer.state_dict() for scorer in scorers]
    scorers[-1].load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return scorers[-1]


def main() -> None:
    work, (model, _) = Path(sys.argv[1]), lab.load()
    for name, legs in LEGS.items():
        scorer = mean([work / leg for leg in legs])
        drop = ("data", "val_data", "out", "start")
        scorer.notes["config"] = {k: v for k, v in scorer.notes["config"].items() if k not in drop}
        scorer.notes["recipe"] = (
            "runs/train_grip.sh: a warm-up on the gradient teacher, then GRPO; config is the last run's"
            + ("; weights are the mean of the last two runs'" if len(legs) > 1 else "")
        )
        if scorer.base is not None:
            scorer.base.check(model)
        scorer.base = replace(BaseModel.of(model), name="gripvlm's lab model")
        scorer.save_pretrained(SHIPPED / name, dtype=torch.float16)
        print(f"{SHIPPED / name}: {scorer.parameters_count / 1e6:.2f} M parameters, legs {', '.join(legs)}")


if __name__ == "__main__":
    main()
