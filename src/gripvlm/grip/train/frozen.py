"""What training does to the frozen model's modules for a while, and undoes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed", "frozen"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block after which the model's modules are in training mode, and its weights require gradients, as before."""
    training = {module: module.training for module in model.modules()}
    required = {weight: weight.requires_grad for weight in model.parameters()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for weight, wanted in required.items():
            weight.requires_grad_(wanted)


@contextmanager
def checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Layers of the language model keep their input alone for a backward pass, and run again in it.

    transformers' own gradient checkpointing acts in training mode only, where dropout would act as well.
    """
    layers = list(model.get_decoder().layers) if wanted else []
    forwards = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, forwards, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
