"""What is left of a prompt from some layer of the language model on, while it runs and in its caches afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

__all__ = ["Change", "Dropped", "Held", "Stage"]

Change: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states [B, L, d] -> those to go on with, where dropped tokens are merged into kept ones."""


@dataclass
class Stage:
    """The tokens that are left from one layer on.

    Attributes:
        order: [B, l] their places in the prompt; padded on the left with places of dropped ones.
        real: [B, l] False for that padding and for the prompt's own.
        left: [B, l] their places among the tokens that the layer before saw.
        change: what became of the hidden states before that, if anything.
    """

    order: Tensor
    real: Tensor
    left: Tensor
    change: Change | None = None

    @functools.cached_property
    def whole(self) -> bool:
        """Whether nothing is padding; asked of the device once, not for every token and layer."""
        return bool(self.real.all())

    def of(self, hidden: Tensor) -> Tensor:
        """[B, l, d]: what is left of the hidden states of the layer before."""
        hidden = hidden if self.change is None else self.change(hidden)
        return hidden.gather(1, self.left[..., None].expand(-1, -1, hidden.shape[-1]))


@dataclass(frozen=True, eq=False)
class Held:
    """What the layers' caches hold of a prompt, for turns that go on from it.

    Attributes:
        mask: [B, L] bool, False at the prompt's padding.
        stages: layer -> the tokens of the prompt that it and those after it hold.
        boolean: whether the model's masks are (sdpa), or are added (eager).
        forget: the layer from which on caches were shortened after the prompt.
    """

    mask: Tensor
    stages: Mapping[int, Stage]
    boolean: bool
    forget: int | None

    def take(self, rows: Tensor) -> Held:
        """Of these rows of the batch [R], in this order."""
        stages = {n: Stage(stage.order[rows], stage.real[rows], stage.left[rows]) for n, stage in self.stages.items()}
        return replace(self, mask=self.mask[rows], stages=stages)


@dataclass
class Dropped:
    """What the latest prompt came to.

    Attributes:
        stages: layer -> [B, L] bool, the tokens of the prompt that layer and those after it see.
        order: [B, l] places in the prompt of the tokens that are left at present, None while all are. Shorter
            samples are padded on the left with places of dropped tokens.
        real: [B, l] False for that padding and for the prompt's own; None while all are left.
        held: what the caches hold, when the prompt has run.
    """

    stages: dict[int, Tensor] = field(default_factory=dict)
    order: Tensor | None = None
    real: Tensor | None = None
    held: Callable[[], Held] | None = None
