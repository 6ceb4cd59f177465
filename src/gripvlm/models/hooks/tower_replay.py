"""Running the last blocks of a vision tower again, from hidden states that were stored, for many choices of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.families import Family
from gripvlm.models.hooks.attention import blocks_of
from gripvlm.models.hooks.calls import call_hooks
from gripvlm.models.hooks.tower_drop import checked_tower_drop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TowerStates", "checked_replay", "record_states", "replay"]


@dataclass
class TowerStates:
    """What entered a block: states [b, t, d], special tokens included, and whether blocks return tuples."""

    states: Tensor | None = None
    tuples: bool = False


def checked_replay(model: PreTrainedModel, family: Family, block: int) -> None:
    """Refuses a tower, or a block of it, from which the rest cannot be run again.

    Raises:
        UnsupportedModelError: rows cannot be dropped in it, or its images are not sequences of their own.
        InputError: no such block, or the first, ahead of which nothing could be stored.
    """
    checked_tower_drop(model, family, block)
    if block < 1:
        raise InputError(f"a stage inside the vision tower chooses before block {block}: use 1 or more")
    if len(_embeddings_of(model)) != 1:
        raise UnsupportedModelError(
            f"{family.model_type}'s vision tower does not take each image as a sequence of its own behind one module "
            "of embeddings, so its last blocks cannot be run again by themselves: train a scorer without --tower-block"
        )


@contextmanager
def record_states(model: PreTrainedModel, block: int) -> Iterator[TowerStates]:
    """Inside, stores what the block before `block` returns, for one run of the tower."""
    seen = TowerStates()

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if seen.states is not None:
            raise InputError("the vision tower runs several times for these images: train without --tower-block")
        seen.tuples = isinstance(output, tuple)
        seen.states = (output[0] if seen.tuples else output).detach()

    with call_hooks(after={blocks_of(model.get_encoder("image"))[block - 1]: keep}):
        yield seen


@contextmanager
def replay(model: PreTrainedModel, block: int, seen: TowerStates) -> Iterator[None]:
    """Inside, the tower starts with `seen.states` at `block`, whatever pixels it is given: only their number counts.

    The modules ahead of that block are replaced for this block of code, for all threads: training owns its model.
    """
    states = seen.states
    (embeddings,) = _embeddings_of(model)
    stand_in = (states,) if seen.tuples else states
    replaced = {embeddings: states} | dict.fromkeys(list(blocks_of(model.get_encoder("image")))[:block], stand_in)
    own = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, value in replaced.items():
            module.forward = lambda *args, value=value, **kwargs: value
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _embeddings_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of the tower that make hidden states of pixels, by their name in transformers."""
    tower = model.get_encoder("image")
    return [module for name, module in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]
