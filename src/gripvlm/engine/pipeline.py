"""`prune_batch`: encode the images, gather their tokens, select, drop. Every public call prunes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gripvlm.engine.by_raster import select_batch
from gripvlm.engine.input_checks import checked_encoding, checked_inputs
from gripvlm.engine.llm_stage import LLMStage, checked_schedule
from gripvlm.engine.outputs import DeferredChecks, check_features, checked_counts, checked_selections
from gripvlm.engine.proportional import ProportionalRun
from gripvlm.engine.request import PruneRequest
from gripvlm.errors import InputError, PrunerError
from gripvlm.models.adapter import encode
from gripvlm.models.drop import Shortened, drop
from gripvlm.models.encoded import Encoded, Span
from gripvlm.models.first_layer import first_keys, first_queries
from gripvlm.models.prompts import EncodedPrompts, Prompts
from gripvlm.models.text import questions
from gripvlm.models.tower_rows import TowerRequest
from gripvlm.models.wrapped import device_of
from gripvlm.pruners import LLMPruner, Pruner
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.timing import Stopwatch

__all__ = ["PrunedBatch", "drop", "encode_tokens", "gather_tokens", "prune_batch", "question_embeddings"]


@dataclass(eq=False)
class PrunedBatch:
    """A batch of prompts, ready to run.

    Attributes:
        prompts: as they were.
        shortened: as they are now.
        selections: a list (prompts) of lists (images), from all rows of each. Where rows are dropped inside the
            language model, complete once the prompt has run.
        run: the work inside the language model while it runs; None if there is none.
        watch: the times of the steps.
        checks: of values on the device, not yet read.
        spans: the images of each prompt.
    """

    prompts: Prompts
    shortened: Shortened
    selections: list[list[Selection]]
    run: LLMStage | ProportionalRun | None
    watch: Stopwatch
    checks: DeferredChecks
    spans: list[list[Span]]

    @property
    def arguments(self) -> dict[str, Any]:
        """For `generate` or `forward`."""
        return self.shortened.arguments

    @property
    def untouched(self) -> bool:
        """Whether the model runs as it would without pruning: no row dropped or merged, no column added."""
        order, full = self.shortened.order, self.shortened.full
        changed = any(s.k < s.n or s.merge is not None for images in self.selections for s in images)
        return self.run is None and order.shape[1] == full and not changed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, run the model on the arguments, once. Checks that failed are raised when the block ends."""
        with self.checks.explaining_errors(), nullcontext() if self.run is None else self.run.block():
            try:
                yield
            finally:
                if self.run is not None:
                    self.selections = _over_all_rows(self.spans, self.run.selections())
        self.checks.raise_if_failed()


def prune_batch(request: PruneRequest, inputs: Mapping[str, Any], encoded: Encoded | None = None) -> PrunedBatch:
    """Prunes the images of a batch of prompts.

    Args:
        inputs: what the model's processor returned.
        encoded: the images, if they are encoded already.

    Raises:
        GripError: the inputs, or what the pruner returned, cannot be used.
    """
    watch, checks = Stopwatch(device_of(request.model)), DeferredChecks()
    images, tokens = encode_tokens(request, inputs, encoded, watch, checks)
    at_input, schedules = _tokens_at_input(request, tokens)
    watch.lap("overhead")

    answers = _select(request.pruner, at_input, checks)
    watch.lap("pruner")

    checked = iter(checked_selections(request.pruner, answers, at_input, checks))
    selections = [[next(checked) for _ in prompt] for prompt in tokens]
    shortened = drop(images, selections, request.drop)
    stage = None
    if isinstance(request.pruner, LLMPruner):
        stage = LLMStage(request, shortened.arguments, tokens, selections, schedules)
        selections = stage.selections()
    run = _run_inside(request, shortened.arguments, images.spans, selections, stage)
    selections = _over_all_rows(images.spans, selections)
    watch.lap("overhead")
    return PrunedBatch(images.prompts, shortened, selections, run, watch, checks, images.spans)


def encode_tokens(
    request: PruneRequest,
    inputs: Mapping[str, Any],
    encoded: Encoded | None,
    watch: Stopwatch,
    checks: DeferredChecks,
) -> tuple[EncodedPrompts, list[list[VisualTokens]]]:
    """The encoded images of a batch, and what the pruner gets for each."""
    inputs = checked_inputs(request.model, request.family, inputs, encoded)
    encoded = checked_encoding(request, inputs, encoded)
    # Values on an accelerator are read before the encoder starts. From then on nothing waits, so that the prefill is
    # queued while the encoder still runs; values are checked after the model has run.
    prompts = Prompts.of(request.model, inputs)
    question = question_embeddings(request, prompts)
    watch.lap("overhead")
    if encoded is None:
        encoded = encode(prompts, request.family, _asking_in_tower(request.needs, question))
        watch.lap("vision")
    images = prompts.with_images(encoded)
    return images, gather_tokens(request, images, question, checks)


def _asking_in_tower(needs: TowerRequest, question: list[Tensor] | None) -> TowerRequest:
    """What is wanted of the tower, where a pruner that drops inside it reads the question of each prompt."""
    dropping = needs.dropping
    if dropping is None or question is None or "question" not in dropping.needs:
        return needs
    asked, choose = question, dropping.select

    def select(images: list[VisualTokens]) -> list[Tensor]:
        return choose([replace(tokens, question=asked[tokens.sample]) for tokens in images])

    return needs._replace(dropping=dropping._replace(select=select))


def question_embeddings(request: PruneRequest, prompts: Prompts) -> list[Tensor] | None:
    """[t, d] embeddings of each prompt's question; None where the pruner does not read it."""
    if "question" not in request.pruner.needs:
        return None
    return questions(request.model, prompts.host, request.question)


def gather_tokens(
    request: PruneRequest, images: EncodedPrompts, question: Sequence[Tensor] | None, checks: DeferredChecks
) -> list[list[VisualTokens]]:
    """The tokens that the pruner gets: a list (prompts) of lists (images, in prompt order), each with its count."""
    pruner = request.pruner
    if not any(images.spans):
        raise InputError("no prompt has an image: there is nothing to prune")
    budgets = request.budgets_for([len(spans) for spans in images.spans])
    batch: list[list[VisualTokens]] = [[] for _ in images.spans]
    first_layer = "first_layer" in pruner.needs
    queries = [first_queries(request.model, one) for one in question or ()] if first_layer else []
    for sample, spans in enumerate(images.spans):
        for image, item in enumerate(span.item for span in spans):
            n, where = item.features.shape[0], f"{item.modality} {image} of sample {sample}"
            where += "" if item.distinct is None else ", its repeats merged,"
            if "grid" in pruner.needs and item.grid is None and not item.rasters:
                raise PrunerError(
                    f"pruner {pruner.name!r} needs rows in a plain raster, but the {n} rows of {where} are none: use "
                    "a pruner without grid"
                )
            asked = None if question is None else question[sample]
            tokens = item.tokens(budgets[sample][image].count(n, where), asked, sample, image)
            if first_layer:
                asks = queries[sample].to(item.features.device) if queries else None
                tokens = replace(tokens, first_queries=asks, first_keys=first_keys(request.model, item.features))
            batch[sample].append(tokens)
    check_features([tokens for sample in batch for tokens in sample], checks)
    return [_with_counts_of_pruner(request, tokens) for tokens in batch]


def _with_counts_of_pruner(request: PruneRequest, images: list[VisualTokens]) -> list[VisualTokens]:
    """A prompt's images with the counts that the pruner moves between them; their sum is that of the budgets."""
    if not images:
        return images
    counts = request.pruner.allocate_budget(images, len(getattr(request.model.get_decoder(), "layers", ())))
    counts = checked_counts(request.pruner, counts, images)
    return [replace(tokens, keep=k) for tokens, k in zip(images, counts, strict=True)]


def _tokens_at_input(
    request: PruneRequest, batch: list[list[VisualTokens]]
) -> tuple[list[VisualTokens], list[list[dict[int, int]]]]:
    """All images with the count to keep at the input; and the schedule of each, for pruners inside the LLM."""
    flat, pruner = [tokens for images in batch for tokens in images], request.pruner
    if not isinstance(pruner, LLMPruner):
        return flat, []
    layers = len(request.model.get_decoder().layers)
    schedules = [[checked_schedule(pruner, tokens, layers) for tokens in images] for images in batch]
    plans = [plan for images in schedules for plan in images]
    # A schedule with an entry for layer 0 drops at the input too; others leave all rows until their first layer.
    at_input = [replace(tokens, keep=plan.get(0, tokens.n)) for tokens, plan in zip(flat, plans, strict=True)]
    return at_input, schedules


def _select(pruner: Pruner, images: list[VisualTokens], checks: DeferredChecks) -> list[Any]:
    """The pruner's output for all images of a batch, unchecked."""
    # NaN of the encoder may make a pruner fail: the error of the failed check is then raised instead of the pruner's.
    with checks.explaining_errors():
        return select_batch(pruner, images, checks)


def _run_inside(
    request: PruneRequest,
    arguments: dict[str, Any],
    spans: list[list[Span]],
    selections: list[list[Selection]],
    stage: LLMStage | None,
) -> LLMStage | ProportionalRun | None:
    """The work inside the language model while it runs; None if there is none."""
    if stage is not None and not stage.layers_that_drop:
        stage = None
    distinct = [[span.item.distinct for span in images] for images in spans]
    merges = any(selection.merge is not None for images in selections for selection in images)
    merges |= any(left is not None for images in distinct for left in images)
    if request.proportional_attention and (merges or stage is not None):
        return ProportionalRun(request.model, arguments, selections, stage, distinct)
    return stage


def _over_all_rows(spans: list[list[Span]], selections: list[list[Selection]]) -> list[list[Selection]]:
    """Selections of the rows that are left where repeats were merged, as selections of all rows of each image."""
    return [
        [
            selection if span.item.distinct is None else span.item.distinct.over_all(selection)
            for span, selection in zip(images, selected, strict=True)
        ]
        for images, selected in zip(spans, selections, strict=True)
    ]
