"""What the vision tower computed for each visual row: attention, keys and hidden states.

The tower's calls are captured patch by patch while it runs, and brought to the items' rows by the family's rule
(`vision_rules.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError
from gripvlm.models.hooks.attention import blocks_of, capture_attention, feature_block
from gripvlm.models.hooks.calls import call_hooks
from gripvlm.models.repeats import RepeatRule
from gripvlm.models.vision_rules import TowerItems, VisionRule
from gripvlm.types import VisionRows, VisualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TowerMerging(NamedTuple):
    """How tokens are merged between the blocks of the tower (see `models/hooks/tower_merge.py`).

    Attributes:
        count: rows before -> rows after.
        plan: (tokens, tokens after, blocks, special tokens in front) -> how many each block merges away.
        match: (keys [b, t, d_h], merges, special tokens in front) -> (source, destination), both [b, merges].
        proportional: whether merged tokens are attended to by their size.
    """

    count: Callable[[int], int]
    plan: Callable[[int, int, int, int], list[int]]
    match: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
    proportional: bool


class TowerDropping(NamedTuple):
    """Which rows are dropped inside the tower (see `models/hooks/tower_drop.py`).

    Attributes:
        block: they are dropped before it.
        count: rows of an image -> rows to keep.
        select: images, their features being hidden states that enter the block -> the rows to keep of each, ascending.
        needs: fields of `VisualTokens` that `select` reads.
    """

    block: int
    count: Callable[[int], int]
    select: Callable[[list[VisualTokens]], list[Tensor]]
    needs: frozenset[str]


class TowerRequest(NamedTuple):
    """The tensors of the vision tower that pruners need in addition to its features.

    Attributes:
        layers: capture attention and keys in these blocks; negative ones count from the last.
        patches: capture the hidden states of patches.
        given: capture attention among patches alone too, where there is a CLS token.
        merging: how the tower merges tokens, if it does.
        dropping: which rows are dropped inside the tower, if any.
        repeats: which cells are merged ahead of the tower, if any are.
        keys: give each item a number from its pixels (`VisualTokens.key`).
    """

    layers: tuple[int, ...] = ()
    patches: bool = False
    given: bool = False
    merging: TowerMerging | None = None
    dropping: TowerDropping | None = None
    repeats: RepeatRule | None = None
    keys: bool = False

    @property
    def changes_tower(self) -> bool:
        """Whether the tower gives other rows than the untouched one."""
        return self.merging is not None or self.dropping is not None or self.repeats is not None


FEATURES_ONLY = TowerRequest()


# --- capturing --------------------------------------------------------------------------------------------------------

# kind -> the queries for `capture_attention`, and how each of its results becomes a map [b, c, L]
KINDS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "received": ("received", lambda weights: weights),
    "cls": ([0], lambda weights: weights[:, :, 0]),
    "keys": ("keys", lambda keys: keys.transpose(1, 2)),
    # A row of weights sums to 1, so the weight of all patches is 1 minus the weight of the CLS token.
    "given": ("to_first", lambda to_cls: (1 - to_cls) / (to_cls.shape[-1] - 1)),
}


@dataclass
class TowerCapture:
    """One run of the tower: kind (as in `KINDS`) -> block -> the map of each call; the states of patches.

    `calls` has what was captured and is no map yet.
    """

    model: PreTrainedModel
    request: TowerRequest
    blocks: int
    calls: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    attention: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    patches: list[Tensor] = field(default_factory=list)

    def convert(self) -> None:
        """Makes maps of the calls so far."""
        for kind, blocks in self.calls.items():
            for block, calls in blocks.items():
                maps = self.attention.setdefault(kind, {}).setdefault(block, [])
                maps.extend(KINDS[kind][1](call) for call in calls)
                calls.clear()


@contextmanager
def capture_tower(model: PreTrainedModel, request: TowerRequest) -> Iterator[TowerCapture]:
    """Inside the block, the vision tower's attention, keys and states are captured."""
    tower = model.get_encoder("image")
    capture = TowerCapture(model, request, len(blocks_of(tower)))

    def keep_state(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Towers that take all patches of a batch as one sequence have no batch axis.
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        capture.patches.append((hidden if hidden.ndim == 3 else hidden[None]).transpose(1, 2))

    with ExitStack() as stack:
        for kind, (queries, _) in KINDS.items():
            if request.layers and (kind != "given" or request.given):
                capture.calls[kind] = stack.enter_context(capture_attention(tower, request.layers, queries))
        if request.patches:
            stack.enter_context(call_hooks(after={feature_block(model): keep_state}))
        yield capture
    capture.convert()


@dataclass(frozen=True)
class DroppedRows:
    """What one run of the tower over b sequences of `length` dropped.

    Attributes:
        block: before this block.
        length: tokens of a sequence before.
        places: [b, t] those that are left, ascending.
        rows: the rows that are left of each item, [k'], ascending.
    """

    block: int
    length: int
    places: Tensor
    rows: list[Tensor]

    def expanded(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [b, c, t] over what is left, a call each, as one [b, c, length]; zeros for what was dropped."""
        left = torch.cat(list(maps), -1)
        places = self.places.to(left.device)[:, None].expand_as(left)
        return [left.new_zeros(*left.shape[:2], self.length).scatter(2, places, left)]


# --- from the tower's calls to items ----------------------------------------------------------------------------------


ItemRows: TypeAlias = tuple[dict[int, VisionRows], Tensor | None]
"""The captured rows of one item: layer as requested -> `VisionRows`, and patches [n, d_v] or None."""


def split_by_item(
    rule: VisionRule | None,
    capture: TowerCapture,
    inputs: Mapping[str, Any],
    counts: Mapping[str, list[int]],
    dropped: Mapping[str, DroppedRows] | None = None,
) -> dict[str, list[ItemRows]]:
    """modality -> the captured tensors of each item, converted to rows. Empties the capture.

    Args:
        counts: modality -> the rows of each item, in the order in which the tower ran.
        dropped: modality -> what was dropped inside the tower; such rows get zeros.
    """
    assert rule is not None  # a family without a rule is refused before the tower runs
    split, dropped = {}, dropped or {}
    for modality, rows in counts.items():
        items = TowerItems(capture.model, inputs, modality, rows)
        # Two numbers may name the same block, such as -1 and the last: it is converted once.
        number = {layer: layer % capture.blocks for layer in capture.request.layers}
        gone, last = dropped.get(modality), capture.blocks
        shorter = {block: gone if gone is not None and block >= gone.block else None for block in range(last)}
        blocks = {b: rows_in_block(rule, capture, items, b, shorter[b]) for b in dict.fromkeys(number.values())}
        patches: Sequence[Tensor | None] = [None] * len(rows)
        if capture.request.patches:
            states = _next_calls(capture.patches, items, gone)
            patches = [rows.T for rows in rule.rows(items, states if gone is None else gone.expanded(states))]
        split[modality] = [
            ({layer: blocks[block][i] for layer, block in number.items()}, patches[i]) for i in range(len(rows))
        ]
    return split


def rows_in_block(
    rule: VisionRule, capture: TowerCapture, items: TowerItems, block: int, dropped: DroppedRows | None = None
) -> list[VisionRows]:
    """The rows of each item in one block of the tower, some of which were `dropped` ahead of it."""
    if block not in capture.attention.get("received", {}):
        tower = type(capture.model.get_encoder("image")).__name__
        raise InputError(
            f"the attention of block {block} of the vision tower, a {tower}, cannot be read, as it does not go through "
            "transformers' attention functions: use a pruner of features only"
        )
    maps = {kind: _next_calls(blocks[block], items, dropped) for kind, blocks in capture.attention.items()}
    seen = maps["received"][0].shape[-1]  # tokens in a call: not the number of all where some were dropped
    if dropped is not None:
        maps = {kind: dropped.expanded(calls) for kind, calls in maps.items()}
    received = rule.rescale(rule.rows(items, maps["received"]), items.counts)
    fields = {"received": received, "keys": [rows.T for rows in rule.rows(items, maps["keys"])]}
    length = maps["received"][0].shape[-1]
    if rule.has_cls(items, length):
        fields["cls"] = cls = rule.rows(items, maps["cls"])
        if capture.request.given:
            fields["given"] = rule.rows(items, maps["given"])
            # `received` is the mean over all queries: without the CLS query's share it is the mean over patches.
            pairs = zip(received, cls, strict=True)
            fields["patch_received"] = [(seen * total - share) / (seen - 1) for total, share in pairs]
    return [VisionRows(**{name: rows[i] for name, rows in fields.items()}) for i in range(len(items.counts))]


def _next_calls(calls: list[Tensor], items: TowerItems, dropped: DroppedRows | None = None) -> list[Tensor]:
    """Takes the calls for the items of one modality off the front of `calls`: the tower runs images before videos."""
    grids = items.inputs.get(f"{items.modality}_grid_thw")
    if grids is None:
        return calls
    # How many calls there are depends on windows and frames, so they are counted by their patches.
    patches, taken = int(grids.prod(-1).sum()) if dropped is None else dropped.places.shape[1], []
    while patches > 0 and calls:
        taken.append(calls.pop(0))
        patches -= taken[-1].shape[-1]
    return taken
