"""Runs an `LLMPruner`: it selects before each layer of its schedule, and every layer's tokens are noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gripvlm.engine.by_raster import select_at_layer
from gripvlm.engine.outputs import checked_selection
from gripvlm.errors import InputError, PrunerError
from gripvlm.models.hooks.attention import capture_attention, last_norm
from gripvlm.models.hooks.calls import call_hooks, one_run
from gripvlm.models.hooks.llm_drop import (
    DropState,
    MergeStates,
    attending,
    drop_in_layers,
    droppable_layers,
    no_labels,
)
from gripvlm.models.text import questions, words
from gripvlm.pruners import LLMPruner
from gripvlm.pruners.ops.schedules import average_tokens
from gripvlm.types import LLMTokens, Selection, VisualTokens

if TYPE_CHECKING:
    from gripvlm.engine.request import PruneRequest

__all__ = ["LLMStage", "Merged", "checked_schedule"]

ATTENTION = frozenset({"last", "question", "keys", "all_keys", "key_sizes", "values"})
"""What of `LLM_NEEDS` is read where a layer attends."""

ENTERING = frozenset({"before", "rotary"})
"""What of it is read as tokens enter the layer before."""


def checked_schedule(pruner: LLMPruner, tokens: VisualTokens, layers: int) -> dict[int, int]:
    """Layer -> how many rows of one image it and those after it see, or a `PrunerError` that names the pruner."""
    schedule = pruner.schedule(tokens.n, tokens.keep, layers)

    def wrong(what: str) -> PrunerError:
        where = f"image {tokens.image} of sample {tokens.sample}"
        return PrunerError(f"pruner {pruner.name!r} on {where}: schedule {schedule} {what}")

    if not isinstance(schedule, Mapping) or not all(isinstance(x, int) for pair in schedule.items() for x in pair):
        raise wrong("must be a dict of ints, layer -> count")
    if outside := [layer for layer in schedule if not 0 <= layer < layers]:
        raise wrong(f"names layer {outside[0]}, but there are {layers}, from 0 to {layers - 1}")
    counts = [tokens.n, *(schedule[layer] for layer in sorted(schedule))]
    if counts[-1] < 1 or counts != sorted(counts, reverse=True):
        raise wrong(f"must go down from {tokens.n}, to 1 at least")
    cost = average_tokens(tokens.n, schedule, layers)
    if abs(cost - tokens.keep) > 0.5:
        raise wrong(f"pays for {cost:.1f} rows on average over {layers} layers, but the budget is {tokens.keep}")
    return dict(schedule)


def watched_layers(pruner: LLMPruner, decoder: Any, layers: Sequence[int]) -> dict[int, int]:
    """Layer that drops -> the layer ahead of it whose attention and keys its pruner reads: the last that attends.

    Args:
        decoder: the language model.
        layers: before which tokens are dropped, ascending.

    Raises:
        InputError: none attends since tokens were last dropped, so that what it saw would be of other tokens.
    """
    if not pruner.llm_needs & ATTENTION:
        return dict.fromkeys(layers, 0)
    attends, allowed = attending(decoder), droppable_layers(decoder)
    watched, earlier = {}, 0
    for layer in layers:
        before = [i for i in range(earlier, layer) if attends[i]]
        # Where none may drop before the layer itself, `drop_in_layers` says so.
        if not before and layer in allowed:
            after = ", ".join(str(i + 1) for i in range(allowed[0] - 1, allowed[-1]) if attends[i])
            raise InputError(
                f"pruner {pruner.name!r} reads attention ahead of layer {layer}, but of the layers {earlier} to "
                f"{layer - 1} all are recurrent: choose other layers for it, best those right after attention ({after})"
            )
        watched[layer], earlier = max(before, default=0), layer
    return watched


class Merged(NamedTuple):
    """Tokens of one image that merge before a layer: their row of the batch, their places [n], and the selection."""

    row: int
    places: Tensor
    selection: Selection


@dataclass(eq=False)
class _Image:
    """An image on its way through the layers.

    Attributes:
        tokens: the image before any drop, with its budget.
        first: what it keeps at the input.
        schedule: layer -> how many rows it and those after it see.
        chosen: layer -> what was selected there.
        rows: layer -> the original rows that are left from there on.
    """

    tokens: VisualTokens
    first: Selection
    schedule: Mapping[int, int]
    chosen: dict[int, Selection]
    rows: dict[int, Tensor]

    def losses(self) -> list[int]:
        """The layers, 1 or more, before which it loses rows."""
        losing, left = [], self.first.k
        for layer, count in sorted(self.schedule.items()):
            if layer > 0 and count < left:
                losing.append(layer)
                left = count
        return losing

    def entering(self, layer: int) -> Tensor:
        """[n] the original rows that are left when a layer is reached, before it drops any."""
        return self.rows[max(earlier for earlier in self.rows if earlier < layer)]

    def selection(self, layers: int) -> Selection:
        """What is kept of it, layer by layer."""
        left, seen = self.first.indices, []
        for layer in range(layers):
            left = self.rows.get(layer, left)
            seen.append(left)
        # The scores of the first choice that had all rows to choose from; later ones rank fewer rows.
        chosen = self.chosen[min(self.chosen)] if self.chosen else self.first
        scores = chosen.scores if chosen.n == self.first.n else self.first.scores
        return replace(self.first, indices=left, scores=scores, layers=tuple(seen))


@dataclass(frozen=True, eq=False)
class _LayerInput:
    """The input of a layer, and the tensors that were captured in the layer before.

    Attributes:
        layer: the layer that it enters.
        hidden: [R, L, d] hidden states; the R / B rows of a prompt follow one another.
        observed: name of a need -> what `capture_attention` noted for it.
        text: [R, L] bool, the text tokens; None if the pruner does not read them.
    """

    layer: int
    hidden: Tensor
    observed: Mapping[str, Tensor]
    text: Tensor | None


class LLMStage:
    """The dropping inside the language model for one batch of prompts, from its prefill to its last token.

    The selection of the first prefill is final: without a cache, every later step runs the prompt again and drops
    the same tokens. Rows that `generate` repeats (beams, several returned sequences) drop the same.

    Args:
        request: its pruner selects; its model's layers may drop.
        arguments: the prompts as the model will get them.
        batch: the images of each prompt as they were before any drop, with their budgets.
        selections: what each image keeps at the input.
        schedules: of each image, layer -> how many rows it and those after it see.

    Attributes:
        layers_that_drop: ascending, 1 or more.
        watched: layer that drops -> the one ahead of it whose attention is read.
        merges: layer -> what each row merges before it, with places in the prompt.
        dropped: the latest prompt's state, for `ProportionalRun`.
    """

    def __init__(
        self,
        request: PruneRequest,
        arguments: Mapping[str, Any],
        batch: Sequence[Sequence[VisualTokens]],
        selections: Sequence[Sequence[Selection]],
        schedules: Sequence[Sequence[Mapping[int, int]]],
    ) -> None:
        assert isinstance(request.pruner, LLMPruner)
        self.pruner, self.model, self.arguments = request.pruner, request.model, arguments
        self.layers = len(self.model.get_decoder().layers)
        self._tail = request.family.tail
        self.merges: dict[int, list[Merged]] = {}
        self.dropped = DropState()
        self._images: list[list[_Image]] = []
        for prompt in zip(batch, selections, schedules, strict=True):
            images = zip(*prompt, strict=True)
            self._images.append([_Image(tokens, s, plan, {}, {0: s.indices}) for tokens, s, plan in images])
        self._is_text = words(self.model, arguments)
        self._text_embeddings = questions(self.model, arguments, None) if "words" in self.pruner.llm_needs else []
        self._observed: dict[str, dict[int, list[Tensor]]] = {}
        self._done = False  # whether every layer has chosen, so that nothing needs to be observed any more
        losses = {layer for images in self._images for image in images for layer in image.losses()}
        self.layers_that_drop = sorted(losses)
        self.watched = watched_layers(self.pruner, self.model.get_decoder(), self.layers_that_drop)
        if self.layers_that_drop:
            no_labels(self.model, (), arguments)

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside, the model's language model drops."""
        # Attention of layer i - 1 is read: it has been computed when layer i is about to run on fewer tokens.
        decoder, before = self.model.get_decoder(), [layer - 1 for layer in self.layers_that_drop]
        watched = [*self.watched.values()]
        queries = {
            "last": lambda length: None if self._done else [length - 1],
            "question": lambda length: None if self._done else self._text_columns(length),
            "keys": lambda length: None if self._done else "keys",
            "all_keys": lambda length: None if self._done else "all_keys",
            "key_sizes": lambda length: None if self._done else "key_sizes",
            "values": lambda length: None if self._done else "values",
        }
        choose = {layer: partial(self._choose, layer) for layer in self.layers_that_drop}
        evict = self.pruner.evict_after_prefill(self.layers)
        with ExitStack() as stack:
            with one_run(self.model.base_model, self.arguments):
                self.dropped = stack.enter_context(drop_in_layers(self.model, choose, evict))
                # In a fixed order: hooks act in the order in which they were put on.
                for name in sorted(self.pruner.llm_needs & queries.keys()):
                    self._observed[name] = stack.enter_context(capture_attention(decoder, watched, queries[name]))
                # Behind the hooks that drop: a layer before which tokens are dropped is entered by those that are left.
                if entering := self.pruner.llm_needs & ENTERING:
                    self._observed |= {name: {} for name in entering}
                    stack.enter_context(call_hooks({decoder.layers[i]: partial(self._note, i) for i in before}))
            yield

    def _note(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a layer: notes the hidden states that enter it and their positions, until all have chosen."""
        if self._done:
            return
        if "before" in self._observed:
            self._observed["before"].setdefault(layer, []).append(args[0].detach())
        if "rotary" in self._observed:
            positions = _rotary(kwargs["position_embeddings"], args[0].shape[0])
            self._observed["rotary"].setdefault(layer, []).append(positions)

    def held(self) -> tuple[DropState | None, None]:
        """What the layers' caches hold once the prompt has run, and the sizes in each layer, which are all 1."""
        return (self.dropped.take() if self.dropped.stages else None), None

    def selections(self) -> list[list[Selection]]:
        """What is kept of each image, layer by layer; final once the prompt has run."""
        return [[image.selection(self.layers) for image in images] for images in self._images]

    # --- the tokens that are left at present ----------------------------------------------------

    def _columns(self, rows: int, length: int) -> Tensor:
        """[rows, length] columns of the prompt that the tokens left at present are from."""
        left, device = self.dropped.latest, self._is_text.device
        return torch.arange(length, device=device).expand(rows, -1) if left is None else left.order.to(device)

    def _text(self, rows: int, length: int) -> Tensor:
        """[rows, length] bool: the text tokens among those that are left."""
        # `generate` repeats each prompt for its beams, side by side.
        is_text = self._is_text.repeat_interleave(rows // self._is_text.shape[0], 0)
        text = is_text.gather(-1, self._columns(rows, length))
        left = self.dropped.latest
        return text if left is None else text & left.real.to(text.device)

    def _text_columns(self, length: int) -> list[int]:
        """Where any prompt has a text token at present."""
        left = self.dropped.latest
        rows = self._is_text.shape[0] if left is None else left.order.shape[0]
        return self._text(rows, length).any(0).nonzero().flatten().tolist()

    # --- the choice before one layer --------------------------------------------------------------

    def _choose(self, layer: int, hidden: Tensor, visual: Tensor) -> tuple[Tensor, MergeStates]:
        """[R, L] bool, the visual tokens that stay, and how the hidden states merge: as `drop_in_layers` asks."""
        rows, length = hidden.shape[:2]
        if rows % len(self._images):
            raise _another_prompt(f"{rows} prompts", f"{len(self._images)}")
        observed = {}
        for name, seen in self._observed.items():
            source = layer - 1 if name in ENTERING else self.watched[layer]
            if seen.get(source):
                observed[name] = seen.pop(source)[-1]
        reads_text = bool(self.pruner.llm_needs & {"question", "text"}) and not self._done
        entering = _LayerInput(layer, hidden, observed, self._text(rows, length) if reads_text else None)
        keep, merged = visual.clone(), []
        for row in range(rows):
            # `generate` repeats each prompt for its beams, side by side.
            images = self._images[row // (rows // len(self._images))]
            by_image = _places_by_image(layer, row, images, visual[row], self._tail)
            for image, places in zip(images, by_image, strict=True):
                n = places.numel()
                if image.schedule.get(layer, n) >= n:
                    continue
                # The first of the repeated rows selects; in later steps all of them drop the same tokens.
                if layer not in image.chosen:
                    self._select(entering, row, image, places)
                selection = image.chosen[layer]
                keep[row, places] = False
                keep[row, places[selection.indices]] = True
                if selection.merge is not None:
                    merged.append(Merged(row, places, selection))
        # In columns of the prompt: places change with every layer that drops.
        columns = self._columns(rows, length)
        self.merges[layer] = [m._replace(places=columns[m.row, m.places.to(columns.device)]) for m in merged]
        self._done = self._done or layer == self.layers_that_drop[-1]
        return keep, partial(_merge_hidden, merges=merged)

    def _select(self, entering: _LayerInput, row: int, image: _Image, places: Tensor) -> None:
        """Selects from an image whose tokens lie at these places of the row."""
        layer, left, tokens = entering.layer, image.entering(entering.layer), image.tokens
        with torch.no_grad():
            fields = self._observed_fields(entering, row, tokens.sample, places)
            seen = LLMTokens(layer, image.schedule[layer], left, tokens, **fields)
            where = f"image {tokens.image} of sample {tokens.sample} before layer {layer}"
            answer = select_at_layer(self.pruner, layer, seen, where)
        image.chosen[layer] = selection = checked_selection(self.pruner.name, answer, seen, where)
        image.rows[layer] = left[selection.indices.to(left.device)]

    def _observed_fields(self, entering: _LayerInput, row: int, sample: int, places: Tensor) -> dict[str, Any]:
        """The fields of `LLMTokens` that the pruner needs, for tokens at these places of the row."""
        needs, hidden, observed = self.pruner.llm_needs, entering.hidden, entering.observed
        fields: dict[str, Any] = {}
        if "hidden" in needs:
            fields["hidden"] = hidden[row, places]
        if "before" in needs:
            fields["before"] = observed["before"][row, places]
        if "last" in needs:
            fields["last"] = observed["last"][row, :, 0, places]
        if "keys" in needs:
            fields["keys"] = observed["keys"][row, places]
        if "all_keys" in needs:
            fields["all_keys"] = observed["all_keys"][row, places]
        if "key_sizes" in needs:
            key_sizes = observed["key_sizes"][row].to(hidden.device)
            fields["key_sizes"] = key_sizes[places]
        if "rotary" in needs:
            fields["rotary"] = observed["rotary"][row, places]
        if "values" in needs:
            values = observed["values"][row].to(hidden.device)
            fields["values"] = values[places]
        if "words" in needs:
            fields["words"] = self._text_embeddings[sample].to(hidden.device)
        if "norm" in needs:
            fields["norm"] = last_norm(self.model)
        if entering.text is not None:
            text = entering.text[row]
            text_places = text.nonzero().flatten().to(hidden.device)
            fields["text"], fields["after"] = hidden[row, text_places], text_places > places[-1]
            if "question" in needs:
                # Queries were noted wherever any prompt has text; these are this prompt's among them.
                own = text[entering.text.any(0)]
                fields["question"] = observed["question"][row][:, own][..., places]
            if "key_sizes" in needs:
                fields["text_key_sizes"] = key_sizes[text_places]
            if "values" in needs:
                fields["text_values"] = values[text_places]
        return fields


def _rotary(positions: Sequence[Tensor], rows: int) -> Tensor:
    """[rows, L, 2, d_r]: cosines and sines, of [B or 1, L, d_r] each, or [axes, B or 1, L, d_r] of M-RoPE."""
    parts = [part if part.ndim == 3 else part.permute(1, 2, 0, 3).flatten(2) for part in positions]
    return torch.stack(parts, dim=2).expand(rows, -1, -1, -1)


def _places_by_image(layer: int, row: int, images: Sequence[_Image], visual: Tensor, tail: int) -> list[Tensor]:
    """The places of each image's tokens in a row whose visual tokens `visual` [L] marks, `tail` more behind each."""
    places, counts = visual.nonzero().flatten(), [image.entering(layer).numel() + tail for image in images]
    if places.numel() != sum(counts):
        raise _another_prompt(f"{places.numel()} visual tokens in row {row}", f"{sum(counts)}")
    return [part[: len(part) - tail] for part in places.split(counts)] if counts else []


def _another_prompt(got: str, expected: str) -> InputError:
    return InputError(
        f"the model ran on {got}, but this block is for a prompt with {expected}: open a block for each prompt, and "
        "run the model on its arguments"
    )


def _merge_hidden(hidden: Tensor, merges: Sequence[Merged]) -> Tensor:
    """Hidden states [B, L, d] in which kept tokens absorb others, as their selections say."""
    if not merges:
        return hidden
    hidden = hidden.clone()  # autograd may need what the layer before returned
    for row, places, selection in merges:
        merge = selection.merge
        assert merge is not None
        states = hidden[row, places]
        source, slot = merge.source.to(states.device), merge.destination.to(states.device)
        weight = merge.weight.to(states.device, torch.float32)[:, None]
        sums = torch.zeros(selection.k, states.shape[1], dtype=torch.float32, device=states.device)
        sums = sums.index_add(0, slot, states[source].float() * weight)
        slots = slot.unique()
        hidden[row, places[selection.indices[slots]]] = sums[slots].to(hidden.dtype)
    return hidden
