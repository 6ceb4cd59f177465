"""`prune` and `prune_inputs`: any pruner on any supported model, with one path for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from gripvlm.checks import (
    PIXELS,
    Keeps,
    checked_budgets,
    checked_imageless,
    checked_inputs,
    checked_needs,
    checked_positions,
    checked_pruner,
    checked_schedule,
    checked_selection,
    one_budget,
)
from gripvlm.clock import device_time
from gripvlm.errors import GripError, InputError, PrunerError
from gripvlm.layered import LayerRun
from gripvlm.models import decoding, seam
from gripvlm.models.encoded import Encoded, Span
from gripvlm.models.families import Family, family_of
from gripvlm.models.layers import checked_layers
from gripvlm.models.text import Question, questions
from gripvlm.pruners import LayerPruner, Pruner, Selection, VisionRows, VisualTokens
from gripvlm.pruners.keep_all import KeepAll

__all__ = ["Record", "encode", "prune", "prune_inputs", "pruned_run", "visual_tokens"]


@dataclass
class Record:
    """What happened in the latest call.

    Attributes:
        selections: a list (samples) of lists (images, in prompt order) of `Selection`; the list of
            a prompt without images is empty. Where a pruner drops inside the language model,
            `selection.counts` says how many rows each layer saw.
        calls: how many calls were recorded so far.
        seconds: {"vision", "pruner", "surgery"}: time in the vision encoder and projector, in the
            pruner, and in finding and dropping rows and placeholders. Accelerators are synchronised
            around each. Inside the language model the pruner's time is part of the prefill's.
    """

    selections: list[list[Selection]] = field(default_factory=list)
    calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

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


def encode(model: Any, inputs: Mapping[str, Any], pruners: Sequence[str | Pruner] = ()) -> Encoded:
    """Runs the vision encoder and projector once; reuse the result across prunings and questions.

    Args:
        model: a supported transformers model.
        inputs: what its processor returns: `input_ids` [B, L] (they say which images belong to
            which prompt) and the pixels.
        pruners: those that will prune it, where any needs attention or patches of the vision tower.

    Returns:
        `Encoded`, to pass as `prune_inputs(..., encoded=...)` with these inputs or with other
        questions about the same images; `encoded.take([0, 0, 1])` picks and repeats samples.
        Gradients flow as they would in `forward`: wrap the call in `torch.no_grad()` to stop them.

    Raises:
        UnsupportedModelError, InputError, PrunerError: see `prune_inputs`.
    """
    family = family_of(model)
    inputs = checked_inputs(model, family, inputs, None)
    asked = checked_needs(family, [checked_pruner(pruner, model) for pruner in pruners])
    started = device_time(model.device)
    encoded = seam.encode(model, family, inputs, asked)
    return replace(encoded, seconds=device_time(model.device) - started)


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
    encoded: Encoded | None = None,
    return_record: bool = False,
) -> Any:
    """Arguments for `model.generate` or `model(...)` in which only the kept visual tokens are left.

    Args:
        model: a supported transformers model.
        inputs: what its processor returns. Any padding side; `labels` [B, L], where given, lose the
            entries of dropped placeholders (which carry no target) and are padded with -100.
        pruner: a name, a spec such as `"random:seed=3"`, or a `Pruner`.
        keep: a count per image, a fraction in (0, 1], or a `Budget`; or a list with one such per
            sample, or with one list per sample that has one per image. Only `keep_all` does
            without.
        positions: "original" leaves every kept token at its position in the full prompt;
            "renumbered" counts anew, as if the dropped tokens had never been.
        question: what pruners that read the question get, the same for all images of a prompt:
            token ids [t], embeddings [t, d], or a list of B of either ([B, t] ids and [B, t, d]
            embeddings also do; negative ids are padding). By default all text tokens of the prompt
            that are not padding, begin, end or visual tokens, as far as the model's configs tell.
        encoded: what `encode` returned, to skip the vision encoder; `inputs` then need no pixels.
        return_record: also return the `Record`.

    Returns:
        A dict with `input_ids`, `attention_mask` (always, 2D), `position_ids` (always),
        `mm_encoder_outputs`, and everything else in `inputs` that is not the vision encoder's; or
        (dict, Record).

    Raises:
        UnsupportedModelError: no support for this model, or none for this pruner on it.
        InputError: no image, a cache or embeddings instead of a full prompt, placeholders and
            images that do not match, a per-token input that gripvlm does not know.
        BudgetError: not a budget, or more than an image has.
        PrunerError: an unknown pruner, one that returned no valid selection, or one that drops inside
            the language model, which arguments cannot say (see `pruned_run`).

    Nothing is patched. Gradients flow through the kept features. On models with M-RoPE the base
    model's `rope_deltas` are set, as transformers itself does for every prompt, so that a decoding
    loop of your own goes on at the right positions; other models need the loop to pass
    `position_ids` that go on from the last ones here.
    """
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    inputs = checked_inputs(model, family, inputs, encoded)
    arguments, record, run = _pruned(model, family, inputs, chooser, keep, positions, question, encoded, False)
    if run is not None:
        raise PrunerError(
            f"pruner {chooser.name!r} drops inside the language model, which arguments alone cannot say: type "
            f"`with gripvlm.pruned_run(model, inputs, {chooser.name!r}, keep) as (arguments, record):` and run the "
            "model inside, or use gripvlm.prune"
        )
    return (arguments, record) if return_record else arguments


@contextmanager
def pruned_run(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
    encoded: Encoded | None = None,
) -> Iterator[tuple[dict[str, Any], Record]]:
    """`prune_inputs` for every pruner, those that drop inside the language model too: run the model in the block.

        with gripvlm.pruned_run(model, inputs, "fastv", keep=192) as (arguments, record):
            logits = model(**arguments).logits          # or model.generate(**arguments)

    Args, Raises: as for `prune_inputs`.

    Yields:
        The arguments, and the `Record`, whose selections are complete once the prompt has run. One prompt
        (batch) a block: choices of the first prefill stay. Logits of a direct `forward` are those of the
        tokens left at the end.
    """
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    inputs = checked_inputs(model, family, inputs, encoded)
    arguments, record, run = _pruned(model, family, inputs, chooser, keep, positions, question, encoded, False)
    if run is None:
        yield arguments, record
        return
    with run.block():
        try:
            yield arguments, record
        finally:
            record.selections = run.selections()


def visual_tokens(
    model: Any,
    inputs: Mapping[str, Any],
    keep: Keeps = 1.0,
    *,
    question: Question = None,
    encoded: Encoded | None = None,
) -> list[list[VisualTokens]]:
    """What pruners see of these inputs, all fields filled: for training a scorer, or for a look.

    Args, Raises: as for `prune_inputs`.

    Returns:
        A list (samples) of lists (images, in prompt order) of `VisualTokens`.
    """
    family = family_of(model)
    inputs = checked_inputs(model, family, inputs, encoded)
    if encoded is None:
        encoded = seam.encode(model, family, inputs)
    return _tokens(model, family, inputs, _Onlooker(), keep, question, encoded)[1]


@contextmanager
def prune(
    model: Any,
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
) -> Iterator[Record]:
    """Inside the block, `model.generate` prunes; the code that calls it stays as it is.

        with gripvlm.prune(model, "divprune", keep=64) as record:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args: as for `prune_inputs`.

    Yields:
        A `Record` of the latest `generate` call.

    Only this object's `generate` is wrapped, and it is as before when the block ends, however it
    ends. What `generate` returns has the *original* prompt ids in front, so code that trims them
    works unchanged; `max_length` and `min_length` count them too. A call without any image passes
    through untouched, with empty selections. Streamers are shown the shortened prompt.

    Raises:
        GripError: a block for this model is already open, or what `prune_inputs` raises.
    """
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    checked_positions(positions)
    checked_needs(family, [chooser])
    if isinstance(chooser, LayerPruner):
        checked_layers(model)
    if not isinstance(keep, (list, tuple)):
        one_budget(chooser, keep)
    before = vars(model).get("generate")
    if getattr(before, "_gripvlm", False):
        raise GripError(
            "this model is already inside a gripvlm.prune block: leave that block first, or prune another model"
        )
    record = Record()
    original = model.generate

    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if not any(kwargs.get(name) is not None for name in PIXELS):
            checked_imageless(model, kwargs)
            rows = kwargs["input_ids"].shape[0] if "input_ids" in kwargs else 0
            record.selections = [[] for _ in range(rows)]
            record.seconds = {"vision": 0.0, "pruner": 0.0, "surgery": 0.0}
            record.calls += 1
            return original(None, *args, **kwargs)
        options = decoding.Options(model, args, kwargs)
        options.refuse(family, isinstance(chooser, LayerPruner))
        given = checked_inputs(model, family, kwargs, None)
        with torch.no_grad():
            arguments, now, run = _pruned(
                model, family, given, chooser, keep, positions, question, None, options.uncached
            )
        options.check_beams(family, arguments, now.selections)
        record.selections, record.seconds = now.selections, now.seconds
        record.calls += 1
        args, arguments = options.shifted(arguments, given["input_ids"].shape[1])
        if run is None:
            output = original(None, *args, **arguments)
        else:
            with run.block():
                output = original(None, *args, **arguments)
            record.selections = run.selections()
        return decoding.with_prompt(output, given["input_ids"], arguments["input_ids"].shape[1])

    generate._gripvlm = True  # type: ignore[attr-defined]
    model.generate = generate
    try:
        yield record
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


# --- the one path both take ---------------------------------------------------------------------


def _pruned(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    keep: Keeps,
    positions: str,
    question: Question,
    encoded: Encoded | None,
    spare_column: bool,
) -> tuple[dict[str, Any], Record, LayerRun | None]:
    """Encode, choose, check, drop: the whole of gripvlm in one function; and what is left to drop in the layers."""
    checked_positions(positions)
    asked = checked_needs(family, [pruner])
    started = device_time(model.device)
    done = encoded if encoded is not None else seam.encode(model, family, inputs, asked)
    seen = device_time(model.device)
    spans, batch = _tokens(model, family, inputs, pruner, keep, question, done)
    schedules: list[list[dict[int, int]]] = []
    at_input = batch
    if isinstance(pruner, LayerPruner):
        checked_layers(model)
        layers = len(model.get_decoder().layers)
        schedules = [[checked_schedule(pruner, tokens, layers) for tokens in sample] for sample in batch]
        at_input = [
            [replace(tokens, keep=plan.get(0, tokens.n)) for tokens, plan in zip(*pair, strict=True)]
            for pair in zip(batch, schedules, strict=True)
        ]
    gathered = device_time(model.device)
    raw = [[pruner.select(tokens) for tokens in sample] for sample in at_input]
    chosen = device_time(model.device)
    selections = [
        [_checked(pruner, *pair) for pair in zip(mine, sample, strict=True)]
        for mine, sample in zip(raw, at_input, strict=True)
    ]
    arguments = seam.shorten(model, inputs, done, spans, selections, positions, spare_column)
    seconds = {
        "vision": seen - started if encoded is None else 0.0,
        "pruner": chosen - gathered,
        "surgery": gathered - seen + device_time(model.device) - chosen,
    }
    run = None
    if isinstance(pruner, LayerPruner):
        run = LayerRun(model, pruner, arguments, batch, selections, schedules)
        selections = run.selections()
    return arguments, Record(selections, 1, seconds), run if run is not None and run.cuts else None


def _checked(pruner: Pruner, selection: Any, tokens: VisualTokens) -> Selection:
    where = f"image {tokens.image} of sample {tokens.sample}"
    return checked_selection(pruner.name, selection, tokens.n, tokens.keep, tokens.features.device, where)


def _tokens(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    keep: Keeps,
    question: Question,
    encoded: Encoded,
) -> tuple[list[list[Span]], list[list[VisualTokens]]]:
    """Where each image lies in its prompt, and what the pruner sees of it."""
    if encoded.model_type != family.model_type:
        raise InputError(f"encoded by a {encoded.model_type} model, but this one is {family.model_type}")
    wanted = checked_needs(family, [pruner])
    if {*wanted.layers} - {*encoded.asked.layers} or (wanted.patches and not encoded.asked.patches):
        raise InputError(
            f"images were encoded without what pruner {pruner.name!r} reads of the vision tower: type "
            f"gripvlm.encode(model, inputs, pruners=[{pruner.name!r}])"
        )
    spans = seam.locate(model, inputs["input_ids"], encoded)
    if not any(spans):
        raise InputError("no prompt has an image: there is nothing to prune")
    budgets = checked_budgets(pruner, keep, spans)
    asked = "question" in pruner.needs
    texts = questions(model, family, inputs, question) if asked else [None] * len(spans)
    batch: list[list[VisualTokens]] = [[] for _ in spans]
    for sample, (mine, text) in enumerate(zip(spans, texts, strict=True)):
        for image, (span, budget) in enumerate(zip(mine, budgets[sample], strict=True)):
            item = span.item
            where = f"{item.modality} {image} of sample {sample}"
            if "grid" in pruner.needs and item.grid is None:
                raise PrunerError(
                    f"pruner {pruner.name!r} needs rows in a plain raster, but the "
                    f"{item.features.shape[0]} rows of {where} are none: use a pruner without grid"
                )
            keeps = budget.count(item.features.shape[0], where)
            if bool(item.features.isnan().any()):
                raise InputError(
                    f"the vision encoder made NaN of {where}: look at its pixels (a corrupt image), or load the model "
                    "in bfloat16 or float32, if float16 overflows"
                )
            vision = {layer: VisionRows(*rows) for layer, rows in item.vision.items()}
            batch[sample].append(
                VisualTokens(item.features, keeps, item.grid, text, sample, image, item.key, vision, item.states)
            )
    return spans, batch


class _Onlooker(KeepAll):
    """Reads everything that need not be there for every model to run."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "question", "key"})
