"""Merging tokens between the blocks of a vision tower: each block from then on, and the projector, see fewer.

The merge stands between the attention and the MLP of the tower's own encoder blocks, in hooks of this block's calls
(`models/hooks/calls.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.families import FAMILIES, Family
from gripvlm.models.hooks.attention import blocks_of, modules_of
from gripvlm.models.hooks.calls import After, Before, before_attention, hooked
from gripvlm.models.hooks.proportional import with_sizes
from gripvlm.models.tower_rows import Merging

__all__ = ["Merged", "checked_tower", "merge_in_tower"]

HALVES = ("layer_norm1", "self_attn", "layer_norm2", "mlp")


class Merged(NamedTuple):
    """What the tower's tokens came to.

    Attributes:
        groups: [b, n] for each row, the row whose place it was merged into (itself, if it stands for its group).
        rank: [b, n] which of the rows that came out of the tower that is.
    """

    groups: Tensor
    rank: Tensor


def checked_tower(model: Any, family: Family) -> None:
    """Raises an UnsupportedModelError where tokens cannot be merged inside this model's vision tower."""
    if not family.merges:
        having = ", ".join(sorted(name for name, row in FAMILIES.items() if row.merges))
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
        if missing := [name for name in HALVES if not hasattr(block, name)]:
            raise UnsupportedModelError(
                f"merging inside the vision tower splits its blocks between attention and MLP, and a "
                f"{type(block).__name__} has no {', '.join(missing)}, which CLIP's and SigLIP's have: use a pruner "
                "that drops at the input"
            )


@dataclass
class _Tower:
    """One run of the tower."""

    merging: Merging
    dropped: int  # rows ahead that the model itself drops
    cls: int  # the length of the sequence that says there is a CLS token
    modules: dict[int, int]
    blocks: int
    plan: list[int] = field(default_factory=list)
    fixed: int = 0
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    sizes: Tensor = field(default_factory=lambda: torch.empty(0))  # [b, t]
    here: Tensor = field(default_factory=lambda: torch.empty(0))  # [b, t] the first block's token that each one is
    at: Tensor = field(default_factory=lambda: torch.empty(0))  # [b, T] where each token of the first block is now
    runs: int = 0

    def begin(self, hidden: Tensor) -> None:
        batch, tokens = hidden.shape[:2]
        self.runs += 1
        self.fixed = max(self.dropped, int(tokens == self.cls))
        left = self.merging.count(tokens - self.dropped) + self.dropped
        self.plan = self.merging.plan(tokens, left, self.blocks, self.fixed)
        self.sizes = torch.ones(batch, tokens, device=hidden.device)
        self.at = self.here = torch.arange(tokens, device=hidden.device).expand(batch, -1)

    def look(self, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        self.keys = key.detach().float().mean(1)
        if not self.merging.proportional or key.shape[2] == self.at.shape[1]:
            return mask
        return with_sizes(module, query, key, mask, options, self.sizes)

    def first(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first block."""
        if getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled():
            raise InputError(
                "gradient checkpointing runs the vision tower's blocks again in backward, when nothing merges any "
                "more: encode under torch.no_grad(), or call model.gradient_checkpointing_disable()"
            )
        self.begin(args[0] if args else kwargs["hidden_states"])

    def between(self, index: int) -> tuple[Before, After, After]:
        """What stands before the second norm of block `index`, behind its MLP, and behind the block.

        The block adds what its MLP gives to the hidden states it had before the merge: the MLP sees the merged ones,
        hands on as many rows as the block expects, and the sum is made here.
        """
        merged = mlp = torch.empty(0)

        def norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal merged
            if not self.plan[index]:
                return None
            merged = self.merge(args[0], self.plan[index])
            return (merged, *args[1:]), kwargs

        def second(module: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
            nonlocal mlp
            mlp = output
            return nn.functional.pad(output, (0, 0, 0, self.plan[index])) if self.plan[index] else None

        def block(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if not self.plan[index]:
                return None
            hidden = merged + mlp
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return norm, second, block

    def merge(self, hidden: Tensor, merges: int) -> Tensor:
        """[b, t - merges, d]: sources gone, destinations the mean of what they absorbed, weighted by size."""
        source, destination = self.merging.match(self.keys, merges, self.fixed)
        batch, tokens, width = hidden.shape
        stays = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device).scatter(1, source, False)
        total = self.sizes.scatter_add(1, destination, self.sizes.gather(1, source))
        gone = hidden.gather(1, source[..., None].expand(-1, -1, width)).float()
        sums = hidden.float() * self.sizes[..., None]
        sums = sums.scatter_add(
            1, destination[..., None].expand(-1, -1, width), gone * self.sizes.gather(1, source)[..., None]
        )
        changed = (total != self.sizes)[..., None]
        merged = torch.where(changed, (sums / total[..., None]).to(hidden.dtype), hidden)
        place = stays.long().cumsum(1) - 1  # of those that stay
        redirect = torch.arange(tokens, device=hidden.device).expand(batch, -1).scatter(1, source, destination)
        self.at = place.gather(1, redirect.gather(1, self.at))
        self.here = self.here[stays].view(batch, -1)
        self.sizes = total[stays].view(batch, -1)
        return merged[stays].view(batch, -1, width)

    def merged(self) -> Merged:
        if self.runs != 1:
            raise InputError(f"the vision tower ran {self.runs} times, but merging inside it expects one run")
        rank = self.at[:, self.dropped :] - self.dropped
        return Merged(self.here[:, self.dropped :].gather(1, rank) - self.dropped, rank)


@contextmanager
def merge_in_tower(model: Any, merging: Merging) -> Iterator[Callable[[], Merged]]:
    """Inside the block, the vision tower merges tokens; `checked_tower` says for which models.

    Yields:
        A function that says, after the tower's run, what became of its rows.
    """
    tower, config = model.get_encoder("image"), model.config
    every = blocks_of(tower)
    number = getattr(config, "vision_feature_layer", -1)
    last = (number if number < 0 else number - 1) % len(every) if number else -1  # states count the embeddings as 0
    counted = list(every)[: last + 1]
    vision = config.vision_config
    run = _Tower(
        merging,
        dropped=int(getattr(config, "vision_feature_select_strategy", None) == "default"),
        cls=(vision.image_size // vision.patch_size) ** 2 + 1,
        modules=modules_of(tower, range(len(counted))),
        blocks=len(counted),
    )
    before: dict[Any, Before] = {counted[0]: run.first}
    after: dict[Any, After] = {}
    for index, block in enumerate(counted):
        before[block.layer_norm2], after[block.mlp], after[block] = run.between(index)
    with hooked(before, after), before_attention(run, first=True):
        yield run.merged
