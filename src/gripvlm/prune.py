"""`prune` and `prune_inputs`: any pruner on any supported model, with one path for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from gripvlm.checks import (
    PIXELS,
    Keeps,
    checked_budgets,
    checked_inputs,
    checked_positions,
    checked_pruner,
    checked_selection,
    one_budget,
)
from gripvlm.clock import device_time
from gripvlm.errors import GripError, InputError, PrunerError
from gripvlm.models import decoding, seam
from gripvlm.models.encoded import Encoded, Span
from gripvlm.models.families import Family, family_of
from gripvlm.models.text import Question, questions
from gripvlm.pruners import Pruner, Selection, VisualTokens
from gripvlm.pruners.keep_all import KeepAll

__all__ = ["Record", "encode", "prune", "prune_inputs", "visual_tokens"]


@dataclass
class Record:
    """What happened in the latest call.

    Attributes:
        selections: a list (samples) of lists (images, in prompt order) of `Selection`; the list of
            a prompt without images is empty.
        calls: how many calls were recorded so far.
        seconds: {"vision", "pruner", "surgery"}: time in the vision encoder and projector, in the
            pruner, and in finding and dropping rows and placeholders. Accelerators are synchronised
            around each.
    """

    selections: list[list[Selection]] = field(default_factory=list)
    calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Visual tokens kept in the latest call, all images of all samples together."""
        return sum(selection.k for sample in self.selections for selection in sample)

    @property
    def total(self) -> int:
        """Visual tokens there were in the latest call."""
        return sum(selection.n for sample in self.selections for selection in sample)


def encode(model: Any, inputs: Mapping[str, Any]) -> Encoded:
    """Runs the vision encoder and projector once; reuse the result across prunings and questions.

    Args:
        model: a supported transformers model.
        inputs: what its processor returns: `input_ids` [B, L] (they say which images belong to
            which prompt) and the pixels.

    Returns:
        `Encoded`, to pass as `prune_inputs(..., encoded=...)` with these inputs or with other
        questions about the same images; `encoded.take([0, 0, 1])` picks and repeats samples.
        Gradients flow as they would in `forward`: wrap the call in `torch.no_grad()` to stop them.

    Raises:
        UnsupportedModelError, InputError: see `prune_inputs`.
    """
    family = family_of(model)
    inputs = checked_inputs(model, family, inputs, None)
    started = device_time(model.device)
    encoded = seam.encode(model, family, inputs)
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
        UnsupportedModelError: no support for this model.
        InputError: no image, a cache or embeddings instead of a full prompt, placeholders and
            images that do not match, a per-token input that gripvlm does not know.
        BudgetError: not a budget, or more than an image has.
        PrunerError: an unknown pruner, or one that returned no valid selection.

    Nothing is patched. Gradients flow through the kept features. On models with M-RoPE the base
    model's `rope_deltas` are set, as transformers itself does for every prompt, so that a decoding
    loop of your own goes on at the right positions; other models need the loop to pass
    `position_ids` that go on from the last ones here.
    """
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    inputs = checked_inputs(model, family, inputs, encoded)
    arguments, record = _pruned(model, family, inputs, chooser, keep, positions, question, encoded, spare_column=False)
    return (arguments, record) if return_record else arguments


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
            rows = kwargs["input_ids"].shape[0] if "input_ids" in kwargs else 0
            record.selections = [[] for _ in range(rows)]
            record.seconds = {"vision": 0.0, "pruner": 0.0, "surgery": 0.0}
            record.calls += 1
            return original(None, *args, **kwargs)
        options = decoding.Options(model, args, kwargs)
        options.refuse(family)
        given = checked_inputs(model, family, kwargs, None)
        with torch.no_grad():
            arguments, now = _pruned(model, family, given, chooser, keep, positions, question, None, options.uncached)
        options.check_beams(family, arguments, now.selections)
        record.selections, record.seconds = now.selections, now.seconds
        record.calls += 1
        args, arguments = options.shifted(arguments, given["input_ids"].shape[1])
        output = original(None, *args, **arguments)
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
) -> tuple[dict[str, Any], Record]:
    """Encode, choose, check, drop: the whole of gripvlm in one function."""
    checked_positions(positions)
    started = device_time(model.device)
    done = encoded if encoded is not None else seam.encode(model, family, inputs)
    seen = device_time(model.device)
    spans, batch = _tokens(model, family, inputs, pruner, keep, question, done)
    gathered = device_time(model.device)
    raw = [[pruner.select(tokens) for tokens in sample] for sample in batch]
    chosen = device_time(model.device)
    selections = [
        [checked_selection(pruner.name, *pair) for pair in zip(mine, sample, strict=True)]
        for mine, sample in zip(raw, batch, strict=True)
    ]
    arguments = seam.shorten(model, inputs, done, spans, selections, positions, spare_column)
    seconds = {
        "vision": seen - started if encoded is None else 0.0,
        "pruner": chosen - gathered,
        "surgery": gathered - seen + device_time(model.device) - chosen,
    }
    return arguments, Record(selections, 1, seconds)


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
            batch[sample].append(VisualTokens(item.features, keeps, item.grid, text, sample, image, item.key))
    return spans, batch


class _Onlooker(KeepAll):
    """Reads everything that need not be there for every model to run."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "question", "key"})
