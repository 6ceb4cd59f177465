"""One small evaluation, and one small training, in processes of their own, for tests that kill them."""

from __future__ import annotations

import test_evaluate  # imported once by the fork server, so that each process starts at once
import torch

from gripvlm.grip.train import train
from tiny_train import asked, tiny_config, tiny_vlm

TASKS = (("letters", 40), ("others", 24))


def evaluation(out: str) -> None:
    """4 arms, 64 questions; one thread, since forked threads may hang."""
    torch.set_num_threads(1)
    tasks = [test_evaluate.Letters(name, count) for name, count in TASKS]
    test_evaluate.run(out, tasks=tasks, pruners=["random", "grid"], keeps=[0.1])


def training(out: str) -> None:
    """Both stages, with a checkpoint after every step."""
    torch.set_num_threads(1)
    config = tiny_config(out=out, warmup_steps=10, steps=30, save_minutes=0.0, val_every=5)
    train(config, *tiny_vlm(), asked(8))
