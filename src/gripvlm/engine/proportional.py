"""Size-aware attention for what pruners merged: the sizes of a batch of prompts, and the block they count in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from gripvlm.engine.llm_stage import LLMStage, Merged
from gripvlm.errors import InputError
from gripvlm.models.hooks.calls import one_run
from gripvlm.models.hooks.llm_drop import CacheContents
from gripvlm.models.hooks.proportional import LayerSizes, proportional_attention
from gripvlm.models.text import visual_places
from gripvlm.types import Selection, sizes_after

__all__ = ["ProportionalRun"]


class ProportionalRun:
    """A prompt's run, from its prefill to its last token, in which merged tokens are attended to by their size.

    Args:
        model: a supported model for which `checked_sizes` passes.
        arguments: the prompts as the model will get them.
        selections: what each image keeps at the input.
        run: the dropping inside the language model, where there is any.
    """

    def __init__(
        self,
        model: Any,
        arguments: Mapping[str, Any],
        selections: list[list[Selection]],
        run: LLMStage | None,
    ) -> None:
        if run is not None and run.pruner.evict_after_prefill(run.layers) is not None:
            raise InputError(
                f"proportional_attention knows the sizes of what each layer saw, but {run.pruner.name!r} drops from "
                "the cache after that: leave proportional_attention out"
            )
        self.model, self.arguments, self.first, self.run = model, arguments, selections, run
        places = visual_places(model, arguments["input_ids"])
        base = torch.ones(places.shape, device=places.device)
        for row, mine, sample in zip(base, places, selections, strict=True):
            if sample:
                row[mine] = torch.cat([sizes_after(s.indices, s.n, s.merge) for s in sample]).to(base.device)
        self.known: Mapping[int, LayerSizes | None] = {}
        self.stages: dict[int, Tensor] = {0: base}  # layer -> [rows, L] sizes, by place in the prompt, from there on

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside, the model's language model attends by size, and drops what it has to."""
        with ExitStack() as stack:
            with one_run(self.model.base_model, self.arguments):
                if self.run is not None:
                    self.run.merged = self._merged
                    stack.enter_context(self.run.block())
                self.known = stack.enter_context(proportional_attention(self.model, self._sizes))
            yield

    def held(self) -> tuple[CacheContents | None, Mapping[int, LayerSizes | None]]:
        """What the layers' caches hold once the prompt has run, and the sizes in each layer."""
        return (None if self.run is None else self.run.held()[0]), dict(self.known)

    def selections(self) -> list[list[Selection]]:
        """What was kept of each image, layer by layer."""
        return self.first if self.run is None else self.run.selections()

    def _merged(self, cut: int, rows: int, merges: Sequence[Merged]) -> None:
        sizes = self._before(cut - 1, rows).clone()
        for row, places, pick in merges:
            own = places[pick.indices.to(places.device)]
            sizes[row, own] = sizes_after(pick.indices, pick.n, pick.merge, sizes[row, places]).to(sizes.device)
        self.stages[cut] = sizes

    def _before(self, layer: int, rows: int) -> Tensor:
        """[rows, L] sizes that hold in this layer, for the prompt's rows or as often as `generate` repeats them."""
        sizes = self.stages[max(cut for cut in self.stages if cut <= layer)]
        return sizes.repeat_interleave(rows // sizes.shape[0], 0)

    def _sizes(self, layer: int, rows: int, total: int) -> LayerSizes:
        sizes = self._before(layer, rows)
        order = None if self.run is None else self.run.dropped.order
        if order is None:
            return LayerSizes(sizes, 0)
        order = order.to(sizes.device)
        sizes = torch.nn.functional.pad(sizes, (0, max(0, total - sizes.shape[1])), value=1.0)
        return LayerSizes(sizes.gather(1, order), total - order.shape[1])
