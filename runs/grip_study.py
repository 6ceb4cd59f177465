"""results/grip.json: the shipped scorers, further ones and the other pruners on the lab's whole test sample.

    python runs/grip_study.py [ARM=FOLDER ...]

An arm is a scorer's folder with a name for the table, such as warmup=.lab/grip/warmup; FOLDER@0.06 tells the scorer
that 6 % of the tokens will be kept, however many are; FOLDER@last is the run's last step, not the best that was
validated. The environment may change OUT (grip.json), OTHERS (pruners by name) and LIMIT (questions a family);
OVERWRITE=1 begins OUT anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from last_step import last_step

from gripvlm import lab
from gripvlm.eval import evaluate
from gripvlm.eval.environment import command_line
from gripvlm.grip.pruner import Grip
from gripvlm.models.loading import quiet
from gripvlm.pruners import register_pruner
from gripvlm.pruners.base import top_k
from gripvlm.types import Selection, VisualTokens

KEEPS = (0.5, 0.25, 0.125, 0.06, 0.03, 0.015)
OTHERS = "oracle,random,grid,norm,divprune,grip,grip:scorer=lab-blind"


@dataclass(frozen=True, eq=False)
class Told(Grip):
    """Grip whose scorer is told the same budget whatever it is: what is lost shows what the budget is good for."""

    name: ClassVar[str] = "told"

    share: float = 0.06

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        said = [replace(tokens, keep=max(1, round(self.share * tokens.n))) for tokens in images]
        rows = [scores[: tokens.n] for scores, tokens in zip(self._scores(said), images, strict=True)]
        return [Selection(top_k(row, one.keep), one.n, row) for row, one in zip(rows, images, strict=True)]


def main() -> None:
    quiet()
    model, processor = lab.load()
    arms = []
    for text in sys.argv[1:]:
        name, _, folder = text.partition("=")
        folder, _, how = folder.partition("@")
        pruner = partial(Grip, folder)
        if how == "last":
            pruner = partial(Grip, f"{folder}@last", last_step(Path(folder)))
        elif how:
            pruner = partial(Told, folder, share=float(how))
        register_pruner(name, pruner)
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
