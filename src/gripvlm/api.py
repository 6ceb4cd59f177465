"""`encode`, `prune_inputs`, `pruned_run` and `visual_tokens`: any pruner on any supported model, as functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from gripvlm.engine.outputs import DeferredChecks
from gripvlm.engine.pipeline import Record, gather, pruned
from gripvlm.engine.request import (
    Keeps,
    checked_inputs,
    checked_needs,
    checked_pruner,
)
from gripvlm.errors import PrunerError
from gripvlm.models import adapter as seam
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import family_of
from gripvlm.models.layout import Layout
from gripvlm.models.text import Question, questions
from gripvlm.models.wrapped import device_of, unwrapped
from gripvlm.pruners import Pruner
from gripvlm.pruners.baselines.keep_all import KeepAll
from gripvlm.types import VisualTokens
from gripvlm.utils.timing import Stopwatch

__all__ = ["Record", "encode", "prune_inputs", "pruned_run", "visual_tokens"]


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
    model = unwrapped(model)
    family = family_of(model)
    inputs = checked_inputs(model, family, inputs, None)
    asked = checked_needs(family, [checked_pruner(pruner, model) for pruner in pruners])
    watch = Stopwatch(device_of(model))
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

    Ids and cache of what runs on these arguments are the shortened prompt's. A further turn on such a cache must pass
    `position_ids` that go on from the full prompt's; `gripvlm.prune` does so by itself.

    Nothing is patched. Gradients flow through the kept features. On models with M-RoPE the base
    model's `rope_deltas` are set, as transformers itself does for every prompt, so that a decoding
    loop of your own goes on at the right positions; other models need the loop to pass
    `position_ids` that go on from the last ones here.
    """
    model = unwrapped(model)
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    inputs = checked_inputs(model, family, inputs, encoded)
    arguments, record, run, _ = pruned(
        model, family, inputs, chooser, keep, positions, question, encoded, False, False, pad_to_multiple_of
    )
    record.deferred.settle()
    if run is not None:
        raise PrunerError(
            f"pruner {chooser.name!r} drops inside the language model, which arguments alone cannot say: type "
            "`with gripvlm.pruned_run(model, inputs, pruner, keep) as (arguments, record):` and run the "
            "model inside, or use gripvlm.api"
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
    proportional_attention: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Iterator[tuple[dict[str, Any], Record]]:
    """`prune_inputs` for every pruner, those that drop inside the language model too: run the model in the block.

        with gripvlm.pruned_run(model, inputs, "fastv", keep=192) as (arguments, record):
            logits = model(**arguments).logits          # or model.generate(**arguments)

    Args, Raises: as for `prune_inputs`, and `proportional_attention` as for `prune`.

    Yields:
        The arguments, and the `Record`, whose selections are complete once the prompt has run. One prompt
        (batch) a block: choices of the first prefill stay. Logits of a direct `forward` are those of the
        tokens left at the end, and so is the cache: it is of no use after the block (see `gripvlm.prune` for chats).
        On an accelerator nothing waits between the vision encoder and your call; NaN
        from the encoder or in a pruner's scores is then found when the block ends.
    """
    model = unwrapped(model)
    family = family_of(model)
    chooser = checked_pruner(pruner, model)
    inputs = checked_inputs(model, family, inputs, encoded)
    arguments, record, run, _ = pruned(
        model,
        family,
        inputs,
        chooser,
        keep,
        positions,
        question,
        encoded,
        False,
        proportional_attention,
        pad_to_multiple_of,
    )
    with record.deferred.at_the_end():
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
    model = unwrapped(model)
    family = family_of(model)
    inputs = checked_inputs(model, family, inputs, encoded)
    layout, deferred, onlooker = Layout.of(model, inputs), DeferredChecks(), _ReadEverything()
    if encoded is None:
        encoded = seam.encode(model, family, inputs, checked_needs(family, [onlooker]), layout)
    texts = questions(model, layout.inputs, question)
    _, batch = gather(model, family, layout, onlooker, keep, texts, encoded, deferred)
    deferred.settle()
    return batch


class _ReadEverything(KeepAll):
    """Reads everything that need not be there for every model to run."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "question", "key"})
