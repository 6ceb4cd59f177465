"""Puts trained scorers for the lab VLM into the package, in half precision: question/, blind/ and small/.

    python runs/ship_grip.py WORK       such as .lab/grip

`question` and `small` are each the mean of the weights of both their legs of GRPO (WORK/first and WORK/question;
WORK/small/first and WORK/small/question). results/grip-ship.json has what the validation questions of WORK/val say of
legs and means: means over questions of the probability of the right answer, and of its being the model's first choice.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gripvlm import lab
from gripvlm.eval import environment
from gripvlm.eval.environment import command_line
from gripvlm.grip.pruner import SHIPPED
from gripvlm.grip.scorer import ModelFingerprint, Scorer
from gripvlm.grip.train.data import load_questions
from gripvlm.grip.train.rewards import probability
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.validation import Validator

LEGS = {"question": ("first", "question"), "blind": ("blind",), "small": ("small/first", "small/question")}
KEEPS = (0.25, 0.125, 0.06, 0.03, 0.015)
RESULT = Path(__file__).parent.parent / "results" / "grip-ship.json"


def mean(folders: list[Path]) -> Scorer:
    """A scorer with the mean of several scorers' weights, and the last one's notes."""
    scorers = [Scorer.from_pretrained(folder) for folder in folders]
    states = [scorer.state_dict() for scorer in scorers]
    scorers[-1].load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return scorers[-1]


def main() -> None:
    work, (model, processor) = Path(sys.argv[1]), lab.load()
    questions = load_questions(str(work / "val" / "questions.jsonl"))
    validator = Validator(Engine(model, processor), questions, KEEPS, probability)
    judged: dict[str, dict[str, dict[str, float]]] = {}
    for name, legs in LEGS.items():
        scorer = mean([work / leg for leg in legs])
        candidates = {leg: Scorer.from_pretrained(work / leg) for leg in legs}
        judged[name] = {leg: validator.judge(one) for leg, one in (candidates | {"shipped": scorer}).items()}
        drop = ("data", "val_data", "out", "start")
        scorer.notes["config"] = {k: v for k, v in scorer.notes["config"].items() if k not in drop}
        scorer.notes["recipe"] = (
            "runs/train_grip.sh: a warm-up on the gradient teacher, then GRPO; config is the last run's"
            + ("; weights are the mean of the last two runs'" if len(legs) > 1 else "")
        )
        if scorer.base is not None:
            scorer.base.check(model)
        scorer.base = replace(ModelFingerprint.of(model), name="gripvlm's lab model")
        scorer.save_pretrained(SHIPPED / name, dtype=torch.float16)
        said = ", ".join(f"{leg} {found['objective']:.4f}" for leg, found in judged[name].items())
        print(f"{SHIPPED / name}: {scorer.parameters_count / 1e6:.2f} M parameters; validation: {said}")
    result = {"schema": "gripvlm.grip_ship/1", "command": command_line(), **environment(), "questions": len(questions)}
    RESULT.write_text(json.dumps(result | {"keeps": KEEPS, "judged": judged}, indent=1) + "\n")


if __name__ == "__main__":
    main()
