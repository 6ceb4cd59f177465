"""The one path that every pruning takes: encode, choose, check, drop; and the record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from gripvlm.engine.llm_stage import LLMStage
from gripvlm.engine.outputs import DeferredChecks, checked_features, checked_selections
from gripvlm.engine.proportional import ProportionalRun
from gripvlm.engine.request import (
    PIXELS,
    Keeps,
    checked_budgets,
    checked_merging,
    checked_multiple,
    checked_needs,
    checked_positions,
    checked_schedule,
)
from gripvlm.errors import GripError, InputError, PrunerError
from gripvlm.models import adapter as seam
from gripvlm.models.encoded import Encoded, Span
from gripvlm.models.families import Family
from gripvlm.models.hooks.proportional import checked_sizes
from gripvlm.models.layout import Layout
from gripvlm.models.text import Question, questions
from gripvlm.models.wrapped import device_of
from gripvlm.pruners import LLMPruner, Pruner, TowerPruner, get_pruner
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.timing import Stopwatch

__all__ = ["Pruned", "Record", "gather", "pruned"]


@dataclass(repr=False)
class Record:
    """What happened in the latest call.

    Attributes:
        selections: a list (samples) of lists (images, in prompt order) of `Selection`; the list of
            a prompt without images is empty. Where a pruner drops inside the language model,
            `selection.counts` says how many rows each layer saw.
        calls: how many calls were recorded so far.
        watch, deferred: the clock that `seconds` are read from, and what is not checked yet.
    """

    selections: list[list[Selection]] = field(default_factory=list)
    calls: int = 0
    watch: Stopwatch | None = field(default=None, repr=False)
    deferred: DeferredChecks = field(default_factory=DeferredChecks, repr=False)

    def __str__(self) -> str:
        """`64 of 576 visual tokens kept (11 %), vision 41 ms, pruner 1 ms, overhead 2 ms`.

        Like `seconds`, this may wait for the accelerator.
        """
        if not self.total:
            return "nothing pruned yet" if not self.calls else "no image in the latest call, so nothing pruned"
        times = "".join(
            f", {name} {1000 * took:.{0 if took >= 0.01 else 1}f} ms" for name, took in self.seconds.items()
        )
        share = 100 * self.paid / self.total
        return f"{self.paid:.6g} of {self.total} visual tokens kept ({share:.3g} %){times}"

    def __repr__(self) -> str:
        return f"Record(calls={self.calls}, kept={self.kept}, total={self.total})"

    @property
    def seconds(self) -> dict[str, float]:
        """{"vision", "pruner", "overhead"}: time in the vision encoder and projector, in the pruner, and in all else
        that pruning adds; empty before the first call. Inside the language model the pruner's time is part of the
        prefill's. On an accelerator reading this waits until it is done.
        """
        none = {} if self.watch is None else dict.fromkeys(("vision", "pruner", "overhead"), 0.0)
        return none | ({} if self.watch is None else self.watch.seconds())

    @property
    def kept(self) -> int:
        """Visual tokens kept (to the last layer) in the latest call, all images of all samples together."""
        return sum(selection.k for sample in self.selections for selection in sample)

    @property
    def paid(self) -> float:
        """The same, averaged over the language model's layers: what `keep` asks for."""
        return sum(selection.paid for sample in self.selections for selection in sample)

    @property
    def total(self) -> int:
        """Visual tokens there were in the latest call."""
        return sum(selection.n for sample in self.selections for selection in sample)


class Pruned(NamedTuple):
    """What one pruning came to.

    Attributes:
        arguments: for `generate` or `forward`.
        record: what was kept.
        run: what is left to do inside the language model while it runs, None where there is nothing.
        shortened: how the prompts became shorter.
    """

    arguments: dict[str, Any]
    record: Record
    run: LLMStage | ProportionalRun | None
    shortened: seam.Shortened

    @property
    def dropped(self) -> bool:
        """Whether any image has fewer rows than it had, or merged ones."""
        return any(s.k < s.n or s.merge is not None for sample in self.record.selections for s in sample)


def pruned(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    keep: Keeps,
    positions: str,
    question: Question,
    encoded: Encoded | None,
    spare_column: bool,
    proportional_attention: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Pruned:
    """Encode, choose, check, drop: the whole of gripvlm in one function; and what is left to do in the layers.

    All that must be read from an accelerator is read before the encoder starts. What is asked of it then is not
    waited for: whether all values were right is in the record's `deferred`, to be settled when the model has run.
    """
    checked_positions(positions)
    multiple = checked_multiple(pad_to_multiple_of)
    if proportional_attention:
        checked_sizes(model)
    asked = checked_needs(family, [pruner])
    if isinstance(pruner, TowerPruner):
        if not any(inputs.get(name) is not None for name in PIXELS):
            raise InputError(
                f"pruner {pruner.name!r} merges inside the vision tower, so an encoding of all rows does not serve it: "
                "leave the pixels in the inputs"
            )
        encoded, asked = None, asked._replace(merging=checked_merging(model, family, pruner, keep))
    watch, deferred = Stopwatch(device_of(model)), DeferredChecks()
    layout = Layout.of(model, inputs)
    texts = questions(model, layout.inputs, question) if "question" in pruner.needs else None
    watch.lap("overhead")
    if encoded is None:
        done = seam.encode(model, family, inputs, asked, layout)
        watch.lap("vision")
    else:
        done = encoded
    spans, batch = gather(model, family, layout, pruner, keep, texts, done, deferred)
    schedules: list[list[dict[int, int]]] = []
    at_input = batch
    if isinstance(pruner, LLMPruner):
        layers = len(model.get_decoder().layers)
        schedules = [[checked_schedule(pruner, tokens, layers) for tokens in sample] for sample in batch]
        at_input = [
            [replace(tokens, keep=plan.get(0, tokens.n)) for tokens, plan in zip(*pair, strict=True)]
            for pair in zip(batch, schedules, strict=True)
        ]
    flat = [tokens for sample in at_input for tokens in sample]
    watch.lap("overhead")
    raw = _chosen(pruner, flat, deferred)
    watch.lap("pruner")
    checked = iter(checked_selections(pruner, raw, flat, deferred))
    selections = [[next(checked) for _ in sample] for sample in at_input]
    arguments, shortened = seam.shorten(
        model, inputs, done, layout, spans, selections, positions, spare_column, pad_to_multiple_of=multiple
    )
    watch.lap("overhead")
    kept, run = selections, None
    if isinstance(pruner, LLMPruner):
        run = LLMStage(model, pruner, arguments, batch, selections, schedules)
        kept = run.selections()
        run = run if run.cuts else None
    record = Record(kept, 1, watch, deferred)
    if proportional_attention and (run is not None or any(s.merge is not None for mine in selections for s in mine)):
        return Pruned(arguments, record, ProportionalRun(model, arguments, selections, run), shortened)
    return Pruned(arguments, record, run, shortened)


def _chosen(pruner: Pruner, images: list[VisualTokens], deferred: DeferredChecks) -> list[Any]:
    """What the pruner makes of all images of a batch."""
    together = getattr(pruner, "select_batch", None)  # an object of the caller's own may do without
    with deferred.as_cause():
        return list(together(images)) if together is not None else [pruner.select(tokens) for tokens in images]


def gather(
    model: Any,
    family: Family,
    layout: Layout,
    pruner: Pruner,
    keep: Keeps,
    texts: list[Tensor] | None,
    encoded: Encoded,
    deferred: DeferredChecks,
) -> tuple[list[list[Span]], list[list[VisualTokens]]]:
    """Where each image lies in its prompt, and what the pruner sees of it; `texts` are the prompts' questions."""
    if encoded.model_type != family.model_type:
        raise InputError(f"encoded by a {encoded.model_type} model, but this one is {family.model_type}")
    wanted = checked_needs(family, [pruner])
    have = encoded.asked
    lacking = {*wanted.layers} - {*have.layers}
    if lacking or wanted.patches > have.patches or wanted.given > have.given or wanted.keys > have.keys:
        raise InputError(
            f"images were encoded without what pruner {pruner.name!r} reads of the vision tower: type "
            f"gripvlm.encode(model, inputs, pruners=[{_as_typed(pruner)}])"
        )
    spans = layout.spans(encoded)
    if not any(spans):
        raise InputError("no prompt has an image: there is nothing to prune")
    budgets = checked_budgets(pruner, keep, spans)
    batch: list[list[VisualTokens]] = [[] for _ in spans]
    for sample, mine in enumerate(spans):
        text = None if texts is None else texts[sample]
        for image, (span, budget) in enumerate(zip(mine, budgets[sample], strict=True)):
            item = span.item
            where = f"{item.modality} {image} of sample {sample}"
            if "grid" in pruner.needs and item.grid is None:
                raise PrunerError(
                    f"pruner {pruner.name!r} needs rows in a plain raster, but the "
                    f"{item.features.shape[0]} rows of {where} are none: use a pruner without grid"
                )
            keeps = budget.count(item.features.shape[0], where)
            batch[sample].append(
                VisualTokens(
                    features=item.features,
                    keep=keeps,
                    grid=item.grid,
                    question=text,
                    sample=sample,
                    image=image,
                    key=item.key,
                    vision=item.vision,
                    patches=item.states,
                    groups=item.groups,
                )
            )
    checked_features([tokens for sample in batch for tokens in sample], deferred)
    return spans, [_allotted(model, pruner, mine) for mine in batch]


def _as_typed(pruner: Pruner) -> str:
    """How to name it in a call: by its name where that makes it, else as the object at hand."""
    try:
        get_pruner(pruner.name)
    except GripError:
        return "pruner"
    return repr(pruner.name)


def _allotted(model: Any, pruner: Pruner, images: list[VisualTokens]) -> list[VisualTokens]:
    """A sample's images with the budgets that the pruner moves between them; their sum is what was asked."""
    if not images or not hasattr(pruner, "allocate_budget"):  # an object of the caller's own may do without
        return images
    counts = list(pruner.allocate_budget(images, len(getattr(model.get_decoder(), "layers", ()))))
    asked = [tokens.keep for tokens in images]
    fits = len(counts) == len(images) and all(1 <= k <= tokens.n for k, tokens in zip(counts, images, strict=True))
    if not fits or sum(counts) != sum(asked):
        raise PrunerError(
            f"pruner {pruner.name!r} allots {counts} to the {len(images)} images of sample {images[0].sample}: allowed "
            f"are counts from 1 to {[tokens.n for tokens in images]} with the sum of the budgets {asked}"
        )
    return [replace(tokens, keep=k) for tokens, k in zip(images, counts, strict=True)]
