"""Puts trained scorers for the lab VLM into the package, in half precision: question/ and blind/ of a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from gripvlm import lab
from gripvlm.pruners.grip import SHIPPED
from gripvlm.scorer import BaseModel, Scorer

source = Path(sys.argv[1])
for name in ("question", "blind"):
    scorer = Scorer.from_pretrained(source / name)
    scorer.notes["config"] = {
        k: v for k, v in scorer.notes["config"].items() if k not in ("data", "val_data", "out", "start")
    }
    scorer.notes["recipe"] = (
        "runs/train_grip.sh: a warm-up on the gradient teacher, then GRPO; config is the last run's"
    )
    model, _ = lab.load()
    if scorer.base is not None:
        scorer.base.check(model)
    scorer.base = replace(BaseModel.of(model), name="gripvlm's lab model")
    scorer.save_pretrained(SHIPPED / name, dtype=torch.float16)
    print(f"{SHIPPED / name}: {scorer.parameters_count / 1e6:.2f} M parameters")
