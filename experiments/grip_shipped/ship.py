"""Puts trained scorers for a lab's model into the package, in half precision: lab, lab-blind and lab-small; lab-dense.

    python -m experiments.run grip_shipped grpo_2       # and lab_blind, small_grpo_2
    python -m experiments.grip_shipped.ship .lab/grip lab
    python -m experiments.run grip_claim grpo
    python -m experiments.grip_shipped.ship .lab/grip lab-dense

`lab` and `lab-small` are each the mean of the weights of two runs of GRPO in a row; validation preferred the mean to
both (results/validation.json). `lab-dense` is the first run of GRPO of grip_claim: 12 minutes with its supervised stage, on
one core.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from gripvlm import lab
from gripvlm.grip.fingerprint import ModelFingerprint
from gripvlm.grip.pruner import SHIPPED
from gripvlm.grip.scorer import Scorer

RUNS = {
    "lab": {
        "grip/question": ("grip_shipped/grpo_1-0", "grip_shipped/grpo_2-0"),
        "grip/blind": ("grip_shipped/lab_blind-0",),
        "grip/small": ("grip_shipped/small_grpo_1-0", "grip_shipped/small_grpo_2-0"),
    },
    "lab-dense": {"dense/grip/question": ("grip_claim/grpo-0",)},
}
"""Lab -> folder in the package -> runs."""
PRIVATE = ("data", "eval_data", "output_dir", "init_from")  # folders of the machine that trained


def averaged(folders: list[Path]) -> Scorer:
    """A scorer with the mean of several scorers' weights, and the last one's notes."""
    scorers = [Scorer.from_pretrained(folder) for folder in folders]
    states = [scorer.state_dict() for scorer in scorers]
    scorers[-1].load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return scorers[-1]


def main() -> None:
    work, name = Path(sys.argv[1]), sys.argv[2]
    model, _ = lab.load(name)
    for place, runs in RUNS[name].items():
        scorer = averaged([work / run for run in runs])
        config = {key: value for key, value in scorer.notes["config"].items() if key not in PRIVATE}
        weights = "; weights are the mean of the last two runs'" if len(runs) > 1 else ""
        study = runs[-1].partition("/")[0]
        scorer.notes |= {"config": config, "recipe": f"experiments/{study}: config is the last run's{weights}"}
        if scorer.base is not None:
            scorer.base.check(model)
        scorer.base = replace(ModelFingerprint.of(model), name=f"gripvlm's {name} model")
        folder = SHIPPED / place
        scorer.half().save_pretrained(folder)
        print(f"{folder}: {scorer.parameters_count / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
