"""results/grip.json: the shipped scorers, further ones and the other pruners on the lab's whole test sample.

    python runs/grip_study.py [ARM=FOLDER ...]

An arm is a scorer's folder with a name for the table, such as warmup=.lab/grip/warmup. The environment may change
OUT (grip.json), OTHERS (pruners by name) and LIMIT (questions a family).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from gripvlm import lab
from gripvlm.evaluate import evaluate
from gripvlm.evaluate.environment import command_line
from gripvlm.loading import quiet
from gripvlm.pruners import register_pruner
from gripvlm.pruners.grip import Grip

KEEPS = (0.5, 0.25, 0.125, 0.06, 0.03, 0.015)
OTHERS = "oracle,random,grid,norm,divprune,grip,grip:scorer=lab-blind"


def main() -> None:
    quiet()
    model, processor = lab.load()
    arms = []
    for text in sys.argv[1:]:
        name, _, folder = text.partition("=")
        register_pruner(name, partial(Grip, folder))
        arms.append(name)
    others = [name for name in os.environ.get("OTHERS", OTHERS).split(",") if name]
    evaluate(
        model,
        processor,
        "lab",
        [*others, *arms],
        KEEPS,
        limit=int(os.environ.get("LIMIT", "100000")),
        batch_size=16,
        out=Path(__file__).parent.parent / "results" / os.environ.get("OUT", "grip.json"),
        overwrite=bool(os.environ.get("OVERWRITE")),
        model_name="lab",
        command=command_line(),
        progress=True,
    )


if __name__ == "__main__":
    main()
