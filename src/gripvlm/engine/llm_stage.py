"""Runs a `LLMPruner`: asks it at each layer of its schedule, and notes what every layer saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gripvlm.engine.outputs import checked_selection
from gripvlm.errors import InputError
from gripvlm.models.hooks.attention import last_norm, watch_attention
from gripvlm.models.hooks.calls import one_run
from gripvlm.models.hooks.llm_drop import drop_in_layers, no_labels
from gripvlm.models.hooks.stages import Change, Dropped, Held
from gripvlm.models.text import questions, words
from gripvlm.pruners import LLMPruner
from gripvlm.types import LLMTokens, Merge, Selection, VisualTokens

__all__ = ["LLMStage", "Merged"]

Place = tuple[int, int, int]  # layer, row of the batch, image
Merged = tuple[int, Tensor, Selection]  # row of the batch, places of an image's tokens, what is kept of them


class LLMStage:
    """The dropping inside the language model for one batch of prompts, from its prefill to its last token.

    The choice is made in the first prefill and stays: without a cache, every later step runs the prompt anew
    and drops the same tokens. Rows that `generate` repeats (beams, several returned sequences) choose alike.

    Args:
        model: a supported model whose layers may drop.
        pruner: what is asked.
        inputs: the prompts as the model will get them.
        batch: what was known of each prompt's images before, `keep` being the budget.
        first: what each image keeps at the input.
        schedules: layer -> count, one for each image.

    Attributes:
        merged: told at each cut, in every prefill, what each row merges; places are those in the prompt.
    """

    def __init__(
        self,
        model: Any,
        pruner: LLMPruner,
        inputs: Mapping[str, Any],
        batch: Sequence[Sequence[VisualTokens]],
        first: Sequence[Sequence[Selection]],
        schedules: Sequence[Sequence[Mapping[int, int]]],
    ) -> None:
        self.model, self.pruner, self.batch, self.first, self.schedules = model, pruner, batch, first, schedules
        self.inputs, self.needs = inputs, pruner.llm_needs
        self.words = words(model, inputs)
        self.embedded = questions(model, inputs, None) if "words" in self.needs else []
        self.layers = len(model.get_decoder().layers)
        self.cuts = sorted(
            {
                cut
                for mine, kept in zip(schedules, first, strict=True)
                for plan, selection in zip(mine, kept, strict=True)
                for cut in _losing(plan, selection.k)
            }
        )
        if self.cuts:
            no_labels(model, (), inputs)
        self.chosen: dict[Place, Selection] = {}
        self.left: dict[tuple[int, int], Tensor] = {}
        self.history: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.done = False
        self.seconds = 0.0
        self.dropped = Dropped()
        self.seen: dict[str, dict[int, list[Tensor]]] = {}
        self.merged: Callable[[int, int, list[Merged]], None] | None = None

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside, the model's language model drops; nothing is opened where nothing is to be dropped."""
        if not self.cuts:
            yield
            return
        decoder, before = self.model.get_decoder(), [cut - 1 for cut in self.cuts]
        queries: dict[str, Any] = {
            "last": lambda length: None if self.done else [length - 1],
            "question": lambda length: None if self.done else self._places(length),
            "keys": lambda length: None if self.done else "keys",
            "key_sizes": lambda length: None if self.done else "key_sizes",
        }
        with ExitStack() as stack:
            choose, forget = {cut: self._at(cut) for cut in self.cuts}, self.pruner.evict_after_prefill(self.layers)
            with one_run(self.model.base_model, self.inputs):
                self.dropped = stack.enter_context(drop_in_layers(self.model, choose, forget))
                for name in sorted(self.needs & queries.keys()):
                    self.seen[name] = stack.enter_context(watch_attention(decoder, before, queries[name]))
            yield

    def held(self) -> tuple[Held | None, None]:
        """What the layers' caches hold once the prompt has run, and the sizes in each layer, which are all 1."""
        return (None if self.dropped.held is None else self.dropped.held()), None

    def selections(self) -> list[list[Selection]]:
        """What was kept of each image, layer by layer; of the first of the rows that a prompt was repeated to."""
        rows = max((row for row, _ in self.left), default=-1) + 1
        repeat = max(1, rows // len(self.batch))
        return [
            [self._selection(sample * repeat, image) for image in range(len(mine))]
            for sample, mine in enumerate(self.batch)
        ]

    def _selection(self, row: int, image: int) -> Selection:
        first = self.first[row // max(1, self._repeat)][image]
        history = self.history.get((row, image), {})
        seen, left = [], first.indices
        for layer in range(self.layers):
            left = history.get(layer, left)
            seen.append(left)
        asked = next((self.chosen[cut, row, image] for cut in self.cuts if (cut, row, image) in self.chosen), None)
        scores = asked.scores if asked is not None and asked.n == first.n else first.scores
        return replace(first, indices=left, scores=scores, layers=tuple(seen))

    @property
    def _repeat(self) -> int:
        rows = max((row for row, _ in self.left), default=-1) + 1
        return rows // len(self.batch)

    def _order(self, rows: int, length: int) -> Tensor:
        """[B, l] places in the prompt of the tokens that are left, [B or B * r of them]."""
        order = self.dropped.order
        device = self.words.device
        return torch.arange(length, device=device).expand(rows, -1) if order is None else order.to(device)

    def _text(self, rows: int, length: int) -> Tensor:
        """[B, l] bool: the text tokens among those that are left."""
        text = self.words.repeat_interleave(rows // self.words.shape[0], 0)
        real = self.dropped.real
        found = text.gather(-1, self._order(rows, length))
        return found if real is None else found & real.to(found.device)

    def _places(self, length: int) -> list[int]:
        """Where any prompt has a text token, at present."""
        order = self.dropped.order
        rows = self.words.shape[0] if order is None else order.shape[0]
        return self._text(rows, length).any(0).nonzero().flatten().tolist()

    def _at(self, cut: int) -> Any:
        """The choice before layer `cut`, as `drop_in_layers` asks for it."""

        def choose(hidden: Tensor, visual: Tensor) -> tuple[Tensor, Change]:
            began = time.perf_counter()
            keep, repeat = visual.clone(), hidden.shape[0] // len(self.batch)
            noted = {name: found.pop(cut - 1)[-1] for name, found in self.seen.items() if found.get(cut - 1)}
            text = self._text(*hidden.shape[:2]) if self.needs & {"question", "text"} and not self.done else None
            merges: list[Merged] = []
            if hidden.shape[0] % len(self.batch):
                raise _another_prompt(f"{hidden.shape[0]} prompts", f"{len(self.batch)}")
            for row in range(hidden.shape[0]):
                places, start = visual[row].nonzero().flatten(), 0
                if cut == self.cuts[0]:
                    kept = sum(selection.k for selection in self.first[row // repeat])
                    if kept != places.numel():
                        raise _another_prompt(f"{places.numel()} visual tokens in row {row}", f"{kept}")
                for image, known in enumerate(self.batch[row // repeat]):
                    if cut == self.cuts[0]:
                        self.left[row, image] = self.first[row // repeat][image].indices
                    rows = self.left[row, image]
                    mine = places[start : start + rows.numel()]
                    start += rows.numel()
                    count = min(rows.numel(), self.schedules[row // repeat][image].get(cut, rows.numel()))
                    if count == rows.numel():
                        continue
                    if (cut, row, image) not in self.chosen:
                        tokens = self._tokens(cut, count, rows, known, row, mine, hidden, noted, text)
                        self.chosen[cut, row, image] = self._ask(cut, tokens)
                    pick = self.chosen[cut, row, image]
                    keep[row, mine] = False
                    keep[row, mine[pick.indices]] = True
                    self.left[row, image] = rows[pick.indices.to(rows.device)]
                    self.history.setdefault((row, image), {})[cut] = self.left[row, image]
                    if pick.merge is not None:
                        merges.append((row, mine, pick))
            if self.merged is not None:
                order = self._order(*hidden.shape[:2])
                moved = [(row, order[row, mine.to(order.device)], pick) for row, mine, pick in merges]
                self.merged(cut, hidden.shape[0], moved)
            self.done = self.done or cut == self.cuts[-1]
            self.seconds += time.perf_counter() - began
            return keep, partial(_merged, merges=merges)

        return choose

    @torch.no_grad()
    def _ask(self, cut: int, tokens: LLMTokens) -> Selection:
        answer = self.pruner.select_at_layer(cut, tokens)
        where = f"image {tokens.image} of sample {tokens.sample} before layer {cut}"
        return checked_selection(self.pruner.name, answer, tokens.n, tokens.keep, tokens.rows.device, where)

    @torch.no_grad()
    def _tokens(
        self,
        cut: int,
        count: int,
        rows: Tensor,
        known: VisualTokens,
        row: int,
        mine: Tensor,
        hidden: Tensor,
        noted: Mapping[str, Tensor],
        text: Tensor | None,
    ) -> LLMTokens:
        """What the pruner sees of the image whose tokens lie at the places `mine` of this row."""
        asked: dict[str, Any] = {}
        if "hidden" in self.needs:
            asked["hidden"] = hidden[row, mine]
        if "last" in self.needs:
            asked["last"] = noted["last"][row, :, 0, mine]
        if "keys" in self.needs:
            asked["keys"] = noted["keys"][row, mine]
        if "key_sizes" in self.needs:
            sizes = noted["key_sizes"][row].to(hidden.device)
            asked["key_sizes"] = sizes[mine]
        if "words" in self.needs:
            asked["words"] = self.embedded[row // (hidden.shape[0] // len(self.batch))].to(hidden.device)
        if "norm" in self.needs:
            asked["norm"] = last_norm(self.model)
        if text is not None:
            said = text[row].nonzero().flatten().to(hidden.device)
            asked["text"], asked["after"] = hidden[row, said], said > mine[-1]
            if "question" in self.needs:
                own = text[row, text.any(0)]  # which of the places that were watched are this prompt's
                asked["question"] = noted["question"][row][:, own][..., mine]
            if "key_sizes" in self.needs:
                asked["text_key_sizes"] = sizes[said]
        return LLMTokens(cut, count, rows, known, **asked)


def _another_prompt(got: str, expected: str) -> InputError:
    return InputError(
        f"the model ran on {got}, but this block is for a prompt with {expected}: open a block for each prompt, and "
        "run the model on its arguments"
    )


def _losing(plan: Mapping[int, int], left: int) -> Iterator[int]:
    """The layers after the first at which an image of `left` rows loses some."""
    for cut in sorted(plan):
        if cut > 0 and plan[cut] < left:
            left = plan[cut]
            yield cut


def _merged(hidden: Tensor, merges: Sequence[Merged]) -> Tensor:
    """Hidden states [B, L, d] in which kept tokens absorb others, as their selections say."""
    if not merges:
        return hidden
    hidden = hidden.clone()
    for row, mine, pick in merges:
        merge: Merge = pick.merge  # type: ignore[assignment]
        states = hidden[row, mine]
        source, slot = merge.source.to(states.device), merge.destination.to(states.device)
        weight = merge.weight.to(states.device, torch.float32)[:, None]
        sums = torch.zeros(pick.k, states.shape[1], dtype=torch.float32, device=states.device)
        sums = sums.index_add(0, slot, states[source].float() * weight)
        slots = slot.unique()
        hidden[row, mine[pick.indices[slots]]] = sums[slots].to(hidden.dtype)
    return hidden
