"""The base of pruners that change another pruner's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner
from gripvlm.types import VisualTokens

__all__ = ["Wrapper", "scores_of"]


@dataclass(frozen=True)
class Wrapper(Pruner):
    """A pruner around another: it needs what that one needs, and `extra` on top.

    Attributes:
        inner: a pruner, its name or its spec. On a command line: `mmr(norm)`, `mmr(random:seed=1)`,
            with options of the wrapper `mmr(norm):balance=0.7`.
    """

    extra: ClassVar[frozenset[str]] = frozenset()

    inner: Any

    def __post_init__(self) -> None:
        from gripvlm.pruners.registry import get_pruner

        if isinstance(self.inner, (tuple, list)):
            raise PrunerError(f"pruner {self.name!r} takes one pruner, got {len(self.inner)}: type {self.name}(norm)")
        object.__setattr__(self, "inner", get_pruner(self.inner))
        self._refuse_layers()

    @property
    def inners(self) -> tuple[Pruner, ...]:
        """All pruners inside."""
        return self.inner if isinstance(self.inner, tuple) else (self.inner,)

    def _refuse_layers(self) -> None:
        for inner in self.inners:
            if inner.stage != "input":
                raise PrunerError(
                    f"pruner {self.name!r} wraps pruners that drop rows at the input, but {inner.name!r} drops "
                    f"them at {inner.stage}"
                )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.extra.union(*(inner.needs for inner in self.inners))

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(sorted({layer for inner in self.inners for layer in inner.vision_layers}))

    def check(self, model: Any) -> None:
        for inner in self.inners:
            if hasattr(inner, "check"):  # an object of the caller's own may do without
                inner.check(model)

    def allocate_budget(self, sample: Sequence[VisualTokens]) -> Sequence[int]:
        """As the inner pruner shares; as asked for, where there are several."""
        return self.inners[0].allocate_budget(sample) if len(self.inners) == 1 else super().allocate_budget(sample)


def scores_of(wrapper: Pruner, inner: Pruner, tokens: VisualTokens) -> Tensor:
    """[n] float scores of a pruner that ranks; a `PrunerError` for one that only chooses."""
    scores = inner.select(tokens).scores
    if scores is None:
        raise PrunerError(
            f"pruner {wrapper.name!r} needs scores, but {inner.name!r} chooses a set without any: "
            "use one that ranks, such as norm"
        )
    return scores.float().to(tokens.features.device)
