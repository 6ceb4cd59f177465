"""Two training processes of one thread each: on two cores nearly twice as fast as one process of two threads.

    torchrun --nproc-per-node 2 -m lab_dense.train_tower ...

The operations of so small a model are too short to be split over threads. Without torchrun one process does the same
with half the pictures a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed


def start() -> int:
    """This process's number; joins the group that torchrun describes, if any."""
    if "RANK" not in os.environ:
        return 0
    distributed.init_process_group("gloo")
    return distributed.get_rank()


def processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def average_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Every process gets the mean of all processes' gradients; a weight without one counts as zero."""
    if not distributed.is_initialized():
        return
    weights = list(weights)
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    flat = torch.cat([g.reshape(-1) for g in grads]).cpu()
    distributed.all_reduce(flat)
    flat = flat.to(grads[0].device) / processes()
    for weight, grad in zip(weights, flat.split([g.numel() for g in grads]), strict=True):
        weight.grad = grad.view_as(weight)
