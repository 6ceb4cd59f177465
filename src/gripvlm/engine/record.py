"""`Record`: what `gripvlm.prune` did in the latest call."""

from __future__ import annotations

from dataclasses import dataclass, field

from gripvlm.types import Selection
from gripvlm.utils.timing import Stopwatch

__all__ = ["Record"]


@dataclass(repr=False)
class Record:
    """What happened in the latest call.

    Attributes:
        selections: a list (samples) of lists (images, in prompt order) of `Selection`; the list of a prompt without
            images is empty. Where a pruner drops inside the language model, `selection.counts` says how many rows
            each layer saw.
        calls: how many calls were recorded so far.
    """

    selections: list[list[Selection]] = field(default_factory=list)
    calls: int = 0
    _watch: Stopwatch | None = None

    def add(self, selections: list[list[Selection]], watch: Stopwatch) -> None:
        """Records one more call, the times of which are on `watch`."""
        self.selections, self._watch = selections, watch
        self.calls += 1

    def __str__(self) -> str:
        """`64 of 576 visual tokens kept (11 %), vision 41 ms, pruner 1 ms, overhead 2 ms`.

        With `, 144 in the vision tower` where some were dropped there. Like `seconds`, this may wait for the
        accelerator.
        """
        if not self.total:
            return "nothing pruned yet" if not self.calls else "no image in the latest call, so nothing pruned"
        times = "".join(f", {name} {1000 * s:.{0 if s >= 0.01 else 1}f} ms" for name, s in self.seconds.items())
        share = 100 * self.paid / self.total
        tower = f", {self.tower_kept} in the vision tower" if self.tower_kept < self.total else ""
        return f"{self.paid:.6g} of {self.total} visual tokens kept ({share:.3g} %){tower}{times}"

    def __repr__(self) -> str:
        return f"Record(calls={self.calls}, kept={self.kept}, total={self.total})"

    @property
    def seconds(self) -> dict[str, float]:
        """{"vision", "pruner", "overhead"}: time in the vision encoder and projector, in the pruner, and in all else
        that pruning adds; empty before the first call. Inside the language model the pruner's time is part of the
        prefill's. On an accelerator reading this waits until it is done.
        """
        if self._watch is None:
            return {}
        return dict.fromkeys(("vision", "pruner", "overhead"), 0.0) | self._watch.seconds()

    @property
    def kept(self) -> int:
        """Visual tokens kept (to the last layer) in the latest call, all images of all samples together."""
        return sum(selection.k for sample in self.selections for selection in sample)

    @property
    def paid(self) -> float:
        """The same, averaged over the language model's layers: what `keep` asks for."""
        return sum(selection.paid for sample in self.selections for selection in sample)

    @property
    def tower_kept(self) -> int:
        """Those that the last blocks of the vision tower saw: fewer than all under `tower` and `repeats`."""
        return sum(s.n if s.tower is None else s.tower for sample in self.selections for s in sample)

    @property
    def total(self) -> int:
        """Visual tokens there were in the latest call."""
        return sum(selection.n for sample in self.selections for selection in sample)
