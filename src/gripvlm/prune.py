"""`prune` and `prune_inputs`: any pruner on any supported model, with one path for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch

from gripvlm.checks import (
    PIXELS,
    Keeps,
    checked_imageless,
    checked_inputs,
    checked_merging,
    checked_multiple,
    checked_needs,
    checked_positions,
    checked_pruner,
    one_budget,
)
from gripvlm.clock import Stopwatch
from gripvlm.errors import GripError, PrunerError
from gripvlm.models import decoding, seam
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import family_of
from gripvlm.models.layout import Layout
from gripvlm.models.sizes import checked_sizes
from gripvlm.models.text import Question, questions
from gripvlm.path import Record, gather, pruned
from gripvlm.pruners import LayerPruner, Pruner, TowerPruner, VisualTokens
from gripvlm.pruners.keep_all import KeepAll
from gripvlm.selections import Doubts

__all__ = ["Record", "encode", "prune", "prune_inputs", "pruned_run", "visual_tokens"]


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
    watch = Stopwatch(model.device)
    encoded = seam.encode(model, family, inputs, asked._replace(keys=True))
    watch.lap("vision")
    return replace(encoded, watches=(watch,))


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
    encoded: Encoded | None = None,
    pad_to_multiple_of: int | None = None,
    return_record: bool = False,
) -> Any:
    """Arguments for `model.generate` or `model(...)` in which only the kept visual tokens are left.

    Args:
        model: a supported transformers model.
        inputs: what its processor returns. Any padding side; `labels` [B, L], where given, lose the
            entries of dropped placeholders (which carry no target) and are padded with -100.
        pruner: a name, a spec such as `"random:seed=3"`, or a `Pruner`.
        keep: a count per image, a fraction in (0, 1], `"<=64"` for at most so many (see `Budget`);
            or a list with one such per sample, or with one list per sample that has one per image.
            Only `keep_all` does without.
        positions: "original" leaves every kept token at its position in the full prompt;
            "renumbered" counts anew, as if the dropped tokens had never been.
        question: what pruners that read the question get, the same for all images of a prompt:
            token ids [t], embeddings [t, d], or a list of B of either ([B, t] ids and [B, t, d]
            embeddings also do; negative ids are padding). By default all text tokens of the prompt
            that are not padding, begin, end or visual tokens, as far as the model's configs tell.
        encoded: what `encode` returned, to skip the vision encoder; `inputs` then need no pixels. A pruner that
            merges inside the vision tower runs it all the same, and needs them.
        pad_to_multiple_of: pad the shortened prompt to a length that is a multiple of this, so that few lengths
            occur and a compiled model is used again.
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
    arguments, record, run = pruned(
        model, family, inputs, chooser, keep, positions, question, encoded, False, False, pad_to_multiple_of
    )
    record.doubts.settle()
    if run is not None:
        raise PrunerError(
            f"pruner {chooser.name!r} drops inside the language model, which arguments alone cannot say: type "
            "`with gripvlm.pruned_run(model, inputs, pruner, keep) as (arguments, record):` and run the "
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
    size_attention: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Iterator[tuple[dict[str, Any], Record]]:
    """`prune_inputs` for every pruner, those that drop inside the language model too: run the model in the block.

        with gripvlm.pruned_run(model, inputs, "fastv", keep=192) as (arguments, record):
            logits = model(**arguments).logits          # or model.generate(**arguments)

    Args, Raises: as for `prune_inputs`, and `size_attention` as for `prune`.

    Yields:
        The arguments, and the `Record`, whose selections are complete once the prompt has run. One prompt
        (batch) a block: choices of the first prefill stay. Logits of a direct `forward` are those of the
        tokens left at the end. On an accelerator nothing waits between the vision encoder and your call; NaN
        from the encoder or in a pruner's scores is then found when the block ends.
    """
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    inputs = checked_inputs(model, family, inputs, encoded)
    arguments, record, run = pruned(
        model, family, inputs, chooser, keep, positions, question, encoded, False, size_attention, pad_to_multiple_of
    )
    with record.doubts.at_the_end():
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
    layout, doubts, onlooker = Layout.of(model, inputs), Doubts(), _Onlooker()
    if encoded is None:
        encoded = seam.encode(model, family, inputs, checked_needs(family, [onlooker]), layout)
    texts = questions(model, layout.inputs, question)
    _, batch = gather(model, family, layout, onlooker, keep, texts, encoded, doubts)
    doubts.settle()
    return batch


@contextmanager
def prune(
    model: Any,
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
    size_attention: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Iterator[Record]:
    """Inside the block, `model.generate` prunes; the code that calls it stays as it is.

        with gripvlm.prune(model, "divprune", keep=64) as record:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args: as for `prune_inputs`, and
        size_attention: every query of the language model attends to a token that a merge made of m tokens
            as if m were there, log m added to its scores (ToMe, arXiv 2210.09461, eq. 1), in the prompt and
            in decoding. m is how many tokens it absorbed (`gripvlm.pruners.sizes_after`), whatever their
            weights. Exact where the m tokens are equal and see one another; where images are causal, they
            would not, and it is as if they did. Without merges nothing changes.

    Yields:
        A `Record` of the latest `generate` call.

    Only this object's `generate` is wrapped, and it is as before when the block ends, however it
    ends. What `generate` returns has the *original* prompt ids in front, so code that trims them
    works unchanged; `max_length` and `min_length` count them too. A call without any image passes
    through untouched, with empty selections. Streamers are shown the shortened prompt.

    Raises:
        GripError: a block for this model is already open, or what `prune_inputs` raises; with
            `size_attention`, an `UnsupportedModelError` where a bias for each key cannot be carried, and an
            `InputError` for a static cache.
    """
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    checked_positions(positions)
    checked_multiple(pad_to_multiple_of)
    if isinstance(chooser, TowerPruner):
        checked_merging(model, family, chooser, keep)
    if size_attention:
        checked_sizes(model)
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
            record.watch = Stopwatch(model.device)
            record.calls += 1
            return original(None, *args, **kwargs)
        options = decoding.Options(model, args, kwargs)
        options.refuse(family, isinstance(chooser, LayerPruner))
        given = checked_inputs(model, family, kwargs, None)
        with torch.no_grad():
            arguments, now, run = pruned(
                model,
                family,
                given,
                chooser,
                keep,
                positions,
                question,
                None,
                options.uncached,
                size_attention,
                pad_to_multiple_of,
            )
        options.check_beams(family, arguments, now.selections)
        record.selections, record.watch, record.doubts = now.selections, now.watch, now.doubts
        record.calls += 1
        args, arguments = options.shifted(arguments, given["input_ids"].shape[1])
        if options.get("do_sample"):  # sampling from NaN takes an accelerator down before anyone can say why
            record.doubts.settle()
        with record.doubts.at_the_end():
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


class _Onlooker(KeepAll):
    """Reads everything that need not be there for every model to run."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "question", "key"})
