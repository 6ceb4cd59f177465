"""The sizes of merged tokens over a run, for proportional attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gripvlm.engine.llm_stage import LLMStage
from gripvlm.errors import InputError
from gripvlm.models.families import family_of
from gripvlm.models.hooks.calls import one_run
from gripvlm.models.hooks.llm_drop import DropState
from gripvlm.models.hooks.proportional import LayerSizes, proportional_attention
from gripvlm.models.repeats import Distinct
from gripvlm.models.text import visual_places
from gripvlm.types import Selection, sizes_after
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ProportionalRun"]


class ProportionalRun:
    """A prompt's run, from its prefill to its last token, in which merged tokens are attended to by their size.

    Args:
        model: a supported model for which `checked_sizes` passes.
        arguments: the prompts as the model will get them.
        selections: what each image keeps at the input.
        stage: the dropping inside the language model, where there is any.
        distinct: of each image, what was merged ahead of the vision tower.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Mapping[str, Any],
        selections: list[list[Selection]],
        stage: LLMStage | None,
        distinct: list[list[Distinct | None]],
    ) -> None:
        if stage is not None and stage.pruner.evict_after_prefill(stage.layers) is not None:
            raise InputError(
                f"proportional_attention knows the sizes of what each layer saw, but {stage.pruner.name!r} drops from "
                "the cache after that: leave proportional_attention out"
            )
        self.model, self.arguments, self.stage = model, arguments, stage
        self._first = selections
        self._in_layers: Mapping[int, LayerSizes | None] = {}
        places, tail = visual_places(model, arguments["input_ids"]), family_of(model).tail
        sizes = torch.ones(places.shape, device=places.device)
        for row, own, images, left in zip(sizes, places, selections, distinct, strict=True):
            before = [None if d is None else onto(d.sizes.astype("float32"), sizes.device) for d in left]
            if images:
                after = [sizes_after(s.indices, s.n, s.merge, b) for s, b in zip(images, before, strict=True)]
                row[own] = torch.cat([nn.functional.pad(part, (0, tail), value=1.0) for part in after]).to(sizes.device)
        self._from: dict[int, Tensor] = {0: sizes}  # layer -> [rows, L] sizes, by column of the prompt, from there on

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside, the language model attends by size, and drops the tokens of its stage."""
        with ExitStack() as stack:
            # Entered together, both serve the same calls: layers must not drop without their sizes, or the reverse.
            with one_run(self.model.base_model, self.arguments):
                if self.stage is not None:
                    stack.enter_context(self.stage.block())
                self._in_layers = stack.enter_context(proportional_attention(self.model, self._sizes))
            yield

    def held(self) -> tuple[DropState | None, Mapping[int, LayerSizes | None]]:
        """What the layers' caches hold once the prompt has run, and the sizes in each layer."""
        return (None if self.stage is None else self.stage.held()[0]), dict(self._in_layers)

    def selections(self) -> list[list[Selection]]:
        """What was kept of each image, layer by layer."""
        return self._first if self.stage is None else self.stage.selections()

    def _sizes(self, layer: int, rows: int, total: int) -> LayerSizes:
        """The sizes that hold in a layer, as `proportional_attention` asks for them."""
        sizes = self._by_column(layer, rows)
        left = None if self.stage is None else self.stage.dropped.latest
        if left is None:
            return LayerSizes(sizes, 0)
        order = left.order.to(sizes.device)
        # Decoded tokens, which a run without a cache has in its prompt, count once.
        sizes = torch.nn.functional.pad(sizes, (0, max(0, total - sizes.shape[1])), value=1.0)
        return LayerSizes(sizes.gather(1, order), total - order.shape[1])

    def _by_column(self, layer: int, rows: int) -> Tensor:
        """[rows, L] sizes of the prompt's tokens in this layer, as often as `generate` repeats each prompt."""
        # Computed when a layer asks, once: which tokens merge is known when the run has come that far, and stays.
        for merging, merges in sorted(({} if self.stage is None else self.stage.merges).items()):
            if merging <= layer and merging not in self._from:
                sizes = _repeated(self._from[max(self._from)], rows).clone()
                for row, places, selection in merges:
                    kept = places[selection.indices.to(places.device)]
                    after = sizes_after(selection.indices, selection.n, selection.merge, sizes[row, places])
                    sizes[row, kept] = after.to(sizes.device)
                self._from[merging] = sizes
        return _repeated(self._from[max(earlier for earlier in self._from if earlier <= layer)], rows)


def _repeated(sizes: Tensor, rows: int) -> Tensor:
    return sizes.repeat_interleave(rows // sizes.shape[0], 0)
