"""What training does to the frozen model's modules for a while, and undoes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Around", "checkpointed", "frozen"]

Around: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes a block, anew each time."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block after which the model's modules are in training mode, and its weights require gradients, as before."""
    training = {module: module.training for module in model.modules()}
    # By name: accelerate's hooks of an offloaded layer put new parameters in place of the old at every forward.
    required = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for name, weight in model.named_parameters():
            weight.requires_grad_(required[name])


@contextmanager
def checkpointed(model: Any, wanted: bool, inside: Around) -> Iterator[None]:
    """Layers of the language model keep their input alone for a backward pass, and run again in it.

    transformers' own gradient checkpointing acts in training mode only, where dropout would act as well.

    Args:
        inside: makes the block in which layers run again: the one they ran in is over by then.
    """
    layers = list(model.get_decoder().layers) if wanted else []
    forwards = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), inside())
        )
    try:
        yield
    finally:
        for layer, own in zip(layers, forwards, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
