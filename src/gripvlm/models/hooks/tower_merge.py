"""Merging tokens between the blocks of a vision tower: each block from then on, and the projector, see fewer.

A merge belongs between the attention and the MLP of an encoder block, in the middle of its `forward`. That forward is
not replaced, but its last step is done over: hooks around the second norm, the MLP and the block (`calls.py`) give the
MLP the merged states and add its output to those, as CLIP's and SigLIP's blocks do with the states before the norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.families import FAMILIES, Family
from gripvlm.models.hooks.attention import blocks_of, modules_of
from gripvlm.models.hooks.calls import After, AttentionCall, Before, call_hooks
from gripvlm.models.hooks.proportional import add_sizes
from gripvlm.models.tower_rows import TowerMerging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
"""What a block must consist of, for its last step to be the one that is done over here."""


class MergedRows(NamedTuple):
    """What became of the tower's rows.

    Attributes:
        groups: [b, n] for each row, the row that it was merged into (itself, if it was not merged).
        rank: [b, n] which of the rows that came out of the tower that is.
    """

    groups: Tensor
    rank: Tensor


def checked_tower(model: PreTrainedModel, family: Family) -> None:
    """Raises an UnsupportedModelError where tokens cannot be merged inside this model's vision tower."""
    if not family.merges:
        having = ", ".join(name for name, row in FAMILIES.items() if row.merges)
        raise UnsupportedModelError(
            f"merging inside {family.model_type}'s vision tower is not supported: it needs a plain ViT of single "
            "images and a projector that works token by token, but here rows are made of blocks of patches, windows, "
            f"tiles or learned queries; it is for {having}"
        )
    layer = getattr(model.config, "vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"merging inside the vision tower needs features of one layer, but vision_feature_layer={layer} reads "
            "several, which would differ in length: use a pruner that drops at the input"
        )
    for block in blocks_of(model.get_encoder("image")):
        if missing := [name for name in PARTS if not hasattr(block, name)]:
            raise UnsupportedModelError(
                f"merging inside the vision tower splits its blocks between attention and MLP, and a "
                f"{type(block).__name__} has no {', '.join(missing)}, which CLIP's and SigLIP's have: use a pruner "
                "that drops at the input"
            )


def refuse_checkpointing(block: nn.Module, does: str) -> None:
    """Raises where the tower's blocks would run again, after the hooks that change them are gone."""
    if getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled():
        raise InputError(
            f"gradient checkpointing runs the vision tower's blocks again in backward, when nothing {does} any "
            "more: encode under torch.no_grad(), or call model.gradient_checkpointing_disable()"
        )


@contextmanager
def merge_in_tower(model: PreTrainedModel, merging: TowerMerging) -> Iterator[Callable[[], MergedRows]]:
    """Inside the block, the vision tower merges tokens; `checked_tower` checks for which models.

    Yields:
        A function that returns, after the tower's run, what became of its rows.
    """
    tower, config, vision = model.get_encoder("image"), model.config, model.config.vision_config
    blocks = blocks_of(tower)
    number = getattr(config, "vision_feature_layer", -1)
    # Hidden states count the embeddings as 0, where no block has run. Blocks behind the features' own do not merge.
    last = (number if number < 0 else number - 1) % len(blocks) if number else -1
    merged = list(blocks)[: last + 1]
    run = _TowerRun(
        merging,
        unused=int(getattr(config, "vision_feature_select_strategy", None) == "default"),
        length_with_cls=(vision.image_size // vision.patch_size) ** 2 + 1,
        blocks=len(merged),
    )
    before: dict[Any, Before] = {merged[0]: run.before_first_block}
    after: dict[Any, After] = {}
    for index, block in enumerate(merged):
        before[block.layer_norm2] = functools.partial(run.merge_before_norm, index)
        after[block.mlp] = functools.partial(run.pad_after_mlp, index)
        after[block] = functools.partial(run.add_after_block, index)
    attention = dict.fromkeys(modules_of(tower, range(len(merged))), run.before_attention)
    # first: hooks that capture attention then see it with sizes
    with call_hooks(before, after, attention, first=True):
        yield run.rows


class _TowerRun:
    """One run of the tower over b images: T tokens in the first block, t in the present one.

    Args:
        merging: how tokens are merged.
        unused: tokens in front that the model itself drops from the features.
        length_with_cls: the length of a sequence that has a CLS token.
        blocks: how many blocks merge.
    """

    def __init__(self, merging: TowerMerging, unused: int, length_with_cls: int, blocks: int) -> None:
        self.merging, self.unused, self.length_with_cls, self.blocks = merging, unused, length_with_cls, blocks
        self.runs = 0
        self.plan: list[int] = []  # how many tokens each block merges away
        self.special = 0  # tokens in front that never merge
        self.keys = torch.empty(0)  # [b, t, d_h] of the present block, the mean over heads
        self.sizes = torch.empty(0)  # [b, t] how many tokens were merged into each
        self.first = torch.empty(0)  # [b, t] the first block's token that each one is
        self.place = torch.empty(0)  # [b, T] where each token of the first block is now
        self.merged = self.mlp = torch.empty(0)  # [b, t, d] the present block's states, and what its MLP makes of them

    def before_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_checkpointing(block, "merges")
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, tokens = hidden.shape[:2]
        self.runs += 1
        self.special = max(self.unused, int(tokens == self.length_with_cls))
        # The budget counts rows, which the projector will see; the plan counts tokens, which the blocks see.
        left = self.merging.count(tokens - self.unused) + self.unused
        self.plan = self.merging.plan(tokens, left, self.blocks, self.special)
        self.sizes = torch.ones(batch, tokens, device=hidden.device)
        self.place = self.first = torch.arange(tokens, device=hidden.device).expand(batch, -1)

    def before_attention(self, call: AttentionCall) -> None:
        # ToMe's similarity: keys, the mean over heads. They stand for the tokens that the MLP is about to see.
        self.keys = call.key.detach().float().mean(1)
        if self.merging.proportional and call.key.shape[2] != self.place.shape[1]:
            add_sizes(call, self.sizes)

    # Three hooks, as no module has the sum of states and attention as its output: it is first seen before the norm.

    def merge_before_norm(self, index: int, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the second norm of block `index`."""
        if not self.plan[index]:
            return None
        self.merged = self._merge(args[0], self.plan[index])
        return (self.merged, *args[1:]), kwargs

    def pad_after_mlp(self, index: int, mlp: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        """After the MLP of block `index`."""
        if not self.plan[index]:
            return None
        self.mlp = output
        # The block is about to add this to its states before the merge, and needs as many rows as those have.
        return nn.functional.pad(output, (0, 0, 0, self.plan[index]))

    def add_after_block(self, index: int, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After block `index`: its last step done over, with merged states."""
        if not self.plan[index]:
            return None
        hidden = self.merged + self.mlp
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _merge(self, hidden: Tensor, merges: int) -> Tensor:
        """[b, t - merges, d]: sources gone, destinations the mean of what they absorbed, weighted by size."""
        source, destination = self.merging.match(self.keys, merges, self.special)
        batch, tokens, width = hidden.shape
        stays = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device).scatter(1, source, False)
        weight = self.sizes.gather(1, source)
        total = self.sizes.scatter_add(1, destination, weight)
        gone = hidden.gather(1, source[..., None].expand(-1, -1, width)).float() * weight[..., None]
        sums = (hidden.float() * self.sizes[..., None]).scatter_add(
            1, destination[..., None].expand(-1, -1, width), gone
        )
        # A token that absorbed nothing keeps its states bit for bit: s * h / s may differ in the last digit.
        changed = (total != self.sizes)[..., None]
        merged = torch.where(changed, (sums / total[..., None]).to(hidden.dtype), hidden)
        rank = stays.long().cumsum(1) - 1  # of those that stay
        target = torch.arange(tokens, device=hidden.device).expand(batch, -1).scatter(1, source, destination)
        self.place = rank.gather(1, target.gather(1, self.place))
        self.first = self.first[stays].view(batch, -1)
        self.sizes = total[stays].view(batch, -1)
        return merged[stays].view(batch, -1, width)

    def rows(self) -> MergedRows:
        if self.runs != 1:
            raise InputError(f"the vision tower ran {self.runs} times, but merging inside it expects one run")
        # Tokens in front never merge, so leaving them out shifts all places by as many.
        rank = self.place[:, self.unused :] - self.unused
        return MergedRows(self.first[:, self.unused :].gather(1, rank) - self.unused, rank)
