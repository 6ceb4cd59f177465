"""One small evaluation in a process of its own, for tests that kill it."""

from __future__ import annotations

import torch

import test_evaluate  # imported once by the fork server, so that each process starts at once

TASKS = (("letters", 40), ("others", 24))


def evaluation(out: str) -> None:
    """4 arms, 64 questions; one thread, since forked threads may hang."""
    torch.set_num_threads(1)
    tasks = [test_evaluate.Letters(name, count) for name, count in TASKS]
    test_evaluate.run(out, tasks=tasks, pruners=["random", "grid"], keeps=[0.1])
