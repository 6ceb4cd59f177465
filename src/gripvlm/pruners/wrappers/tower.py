"""Tower: one pruner inside the vision tower, and one behind its projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gripvlm.budget import Budget
from gripvlm.errors import BudgetError, PrunerError
from gripvlm.pruners.base import Pruner, Wrapper
from gripvlm.types import Merge, Part, Selection, VisualTokens

IN_TOWER = frozenset({"features", "grid", "key", "vision_attention", "vision_given"})
"""What a pruner may need of the rows inside the tower."""


@dataclass(frozen=True)
class Tower(Wrapper):
    """k' of n rows inside the vision tower, then k of these k' behind the projector.

    `tower(norm,divprune):block=4,tower_keep=50%` runs blocks 0 to 3 on all patches. Then `norm` chooses half of the
    rows, and blocks 4 and later see the patches of these alone. Last `divprune` chooses `keep` of the rows that are
    left. `keep` counts against all n rows, as ever, and is what the language model pays for; `tower_keep` is what the
    rest of the tower pays for. With one pruner, `tower(norm)`, it chooses at both places.

    The first pruner's `features` are the hidden states that enter the block, a row of several patches having their
    mean; `vision_attention` is that of the block before, whatever blocks it names. A row is kept or dropped with all of
    its patches, and a CLS token stays. The rows that are kept come out as if the other patches had been masked in the
    attention of all blocks from `block` on.

    1. Ours, as a frame for any score; dropping patches between the blocks of a ViT by a score is from DynamicViT (arXiv
       2106.02034) and EViT (arXiv 2202.07800), which train for it and do so at several blocks. Here only `grip` can be
       trained for it; inside the tower it takes a scorer that has a stage there (`gripvlm train --tower-block`).
    2. What the first pruner would merge is dropped.
    3. Images of one batch do not share the tower's budget, nor do tiles: `tower_keep` is that of each.

    Attributes:
        inner: one pruner, or two: inside the tower, and behind the projector.
        block: rows are dropped before this block of the tower; 0 drops embedded patches.
        tower_keep: rows to keep there, a count or a share of each image's rows.
    """

    name = "tower"
    stage = "vision"
    source = "wrapper: patches dropped inside the vision tower (DynamicViT, arXiv 2106.02034; EViT, arXiv 2202.07800)"
    many = True

    block: int = 4
    tower_keep: int | float | str = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.inner) > 2:
            raise PrunerError(
                f"pruner 'tower' takes one pruner, or two, got {len(self.inner)}: use tower(norm), or "
                "tower(norm,divprune) for norm inside the tower and divprune behind its projector"
            )
        self.require(self.block >= 0, "block=4, 0 or more")
        # Read here, so that a wrong budget is refused at once.
        try:
            object.__setattr__(self, "tower_keep", Budget.of(self.tower_keep).plain)
        except BudgetError as error:
            raise BudgetError(str(error).replace("keep=", "tower_keep=")) from None
        inside, behind = self.inside, self.behind
        allowed = IN_TOWER if inside is self.inners[0] else IN_TOWER | {"question"}
        if lacking := sorted(inside.needs - allowed):
            raise PrunerError(
                f"pruner 'tower': {inside.name!r} needs {', '.join(lacking)}, which there is not inside the vision "
                f"tower: use one that needs only {', '.join(sorted(IN_TOWER))}, such as norm, as in "
                f"tower(norm,{behind.name})"
            )
        if inside.joint:
            raise PrunerError(
                f"pruner 'tower': {inside.name!r} moves budget between images, but all have the same inside the tower"
            )
        if "vision_attention" in inside.needs and self.block == 0:
            raise PrunerError(
                f"pruner 'tower': {inside.name!r} reads the attention of the block before, and block=0 is the first: "
                "use block=1 or more"
            )
        if lacking := sorted(behind.needs & {"grid", "vision_given"}):
            raise PrunerError(
                f"pruner 'tower': {behind.name!r} needs {', '.join(lacking)} of all rows, but not all are left behind "
                "the tower: use another, such as divprune"
            )

    @property
    def inside(self) -> Pruner:
        """Chooses inside the tower."""
        return self.inners[0].in_tower(self.block)

    @property
    def behind(self) -> Pruner:
        """Chooses behind the projector."""
        return self.inners[-1]

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.behind.needs | {"tower_rows"} | (self.inside.needs & {"question"})

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.behind.vision_layers

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.behind.joint

    @property
    def may_exceed(self) -> bool:  # type: ignore[override]
        return self.behind.may_exceed

    @property
    def tower_budget(self) -> Budget:
        return Budget.of(self.tower_keep)

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> Sequence[int]:
        return self.behind.allocate_budget([self._left(tokens) for tokens in images], num_layers)

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        answers = self.behind.select_batch([self._left(tokens) for tokens in images])
        return [_of_all(answer, tokens) for answer, tokens in zip(answers, images, strict=True)]

    def _left(self, tokens: VisualTokens) -> VisualTokens:
        """The rows that the tower left, as an image of their own."""
        rows = tokens.tower_rows
        assert rows is not None  # promised by `needs`
        if tokens.keep > len(rows):
            raise BudgetError(
                f"image {tokens.image} of sample {tokens.sample} is to keep {tokens.keep} of {tokens.n} visual tokens, "
                f"but tower_keep={self.tower_keep} leaves {len(rows)} of them: pass a smaller keep or a larger "
                "tower_keep"
            )
        return left_by_tower(tokens)


def left_by_tower(tokens: VisualTokens) -> VisualTokens:
    """The rows `tokens.tower_rows` alone."""
    rows = tokens.tower_rows
    assert rows is not None
    return replace(
        tokens,
        features=tokens.features[rows],
        grid=None,
        rasters=(),
        vision={layer: seen.at(rows) for layer, seen in tokens.vision.items()},
        patches=None if tokens.patches is None else tokens.patches[rows],
        first_keys=None if tokens.first_keys is None else tokens.first_keys[rows],
        tower_rows=None,
        part=Part(rows, tokens.n, tokens.grid),
    )


def _of_all(answer: Selection, tokens: VisualTokens) -> Selection:
    """A selection of the rows that the tower left, as one of all rows."""
    rows = tokens.tower_rows
    assert rows is not None
    merge = answer.merge
    if merge is not None:
        merge = Merge(rows[merge.source.to(rows.device)], merge.destination, merge.weight)
    indices = rows[answer.indices.to(rows.device)]
    return Selection(indices, tokens.n, merge=merge, sound=answer.sound, tower=len(rows))
