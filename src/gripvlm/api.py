"""The public calls: `prune`, and `prune_inputs`, `pruned_run`, `encode` and `visual_tokens` as functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from gripvlm.engine.block import PruneBlock
from gripvlm.engine.input_checks import checked_encoding, checked_inputs
from gripvlm.engine.outputs import DeferredChecks
from gripvlm.engine.pipeline import gather_tokens, prune_batch, question_embeddings
from gripvlm.engine.pruner_checks import checked_needs, checked_pruner
from gripvlm.engine.record import Record
from gripvlm.engine.request import Keeps, PruneRequest
from gripvlm.errors import PrunerError
from gripvlm.models import adapter
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import family_of
from gripvlm.models.prompts import Prompts
from gripvlm.models.text import Question
from gripvlm.models.wrapped import device_of, unwrapped
from gripvlm.pruners import Pruner
from gripvlm.pruners.baselines.keep_all import KeepAll
from gripvlm.types import VisualTokens
from gripvlm.utils.timing import Stopwatch

__all__ = ["Record", "encode", "prune", "prune_inputs", "pruned_run", "visual_tokens"]


def prune(
    model: nn.Module,
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
    proportional_attention: bool = False,
    pad_to_multiple_of: int | None = None,
) -> PruneBlock:
    """Inside the block, `model.generate` and `model(...)` prune; the code that calls them stays as it is.

        with gripvlm.prune(model, "divprune", keep=64) as record:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args:
        model, pruner, keep, positions, question, pad_to_multiple_of: as for `prune_inputs`.
        proportional_attention: a token that a merge made of m tokens counts in attention as m: log m is added to its
            scores in the language model (ToMe, arXiv 2210.09461, eq. 1). m is how many tokens it absorbed
            (`gripvlm.pruners.sizes_after`), whatever their weights. Exact where the m tokens are equal and see one
            another, which causal images do not. Without merges nothing changes.

    Returns:
        A block, which yields the `Record` of the latest call.

    `generate` returns the original prompt's ids in front; stopping criteria, logits processors and streamers see them
    too, and `max_length` and `min_length` count them. The logits of `model(**inputs)` are those of the tokens that are
    left, `labels` lose the entries of dropped placeholders, and gradients flow. A call without any image passes through
    untouched.

    A further turn, by either, on the cache of a call (`return_dict_in_generate=True`, or a cache of your own) continues
    from the tokens that were kept: pass the whole conversation's ids, or the new ones with a mask of the whole.
    Outside of any block such a cache refuses to be used.

    Only this object's `generate` and `forward` are replaced, until the last block for the model ends, however it ends.
    Threads may each open a block of their own for one model; a thread without one uses the only block that is open,
    and is refused where there are several.

    Raises:
        GripError: a block for this model is already open in this thread, or what `prune_inputs` raises; with
            `proportional_attention`, an `UnsupportedModelError` where a bias for each key cannot be carried, and an
            `InputError` for a static cache.
    """
    request = PruneRequest.of(
        model,
        pruner,
        keep,
        positions=positions,
        question=question,
        proportional_attention=proportional_attention,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    return PruneBlock(request)


def prune_inputs(
    model: nn.Module,
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
        inputs: what its processor returns. Any padding side; `labels` [B, L], where given, lose the entries of
            dropped placeholders (which carry no target) and are padded with -100.
        pruner: a name, a spec such as `"random:seed=3"`, or a `Pruner`.
        keep: a count per image, a fraction in (0, 1], `"<=64"` for at most so many (see `Budget`); or a list with one
            such per sample, or with one list per sample that has one per image. Only `keep_all` does without.
        positions: "original" leaves every kept token at its position in the full prompt; "renumbered" counts anew, as
            if the dropped tokens had never been.
        question: what pruners that read the question get, the same for all images of a prompt: token ids [t],
            embeddings [t, d], or a list of B of either ([B, t] ids and [B, t, d] embeddings also do; negative ids are
            padding). By default all text tokens of the prompt that are not padding, begin, end or visual tokens.
        encoded: what `encode` returned, to skip the vision encoder; `inputs` then need no pixels. A pruner that
            merges inside the vision tower runs it all the same, and needs them.
        pad_to_multiple_of: pad the shortened prompt to a length that is a multiple of this, so that few lengths occur
            and a compiled model is used again.
        return_record: also return the `Record`.

    Returns:
        A dict with `input_ids`, `attention_mask` (always, 2D), `position_ids` (always), `mm_encoder_outputs`, and
        everything else in `inputs` that is not the vision encoder's; or (dict, Record).

    Raises:
        UnsupportedModelError: no support for this model, or none for this pruner on it.
        InputError: no image, a cache or embeddings instead of a full prompt, placeholders and images that do not
            match, a per-token input that gripvlm does not know.
        BudgetError: not a budget, or more than an image has.
        PrunerError: an unknown pruner, one that returned no valid selection, or one that drops inside the language
            model, which arguments cannot say (see `pruned_run`).

    Nothing is patched, and gradients flow through the kept features. Ids and cache of what runs on these arguments are
    the shortened prompt's: a decoding loop of your own, or a further turn on the cache, must pass `position_ids` that
    continue the last ones here (`gripvlm.prune` does so by itself). On models with M-RoPE the base model's
    `rope_deltas` are set, as transformers does for every prompt, so that its own counting continues.
    """
    request = PruneRequest.of(
        model, pruner, keep, positions=positions, question=question, pad_to_multiple_of=pad_to_multiple_of
    )
    batch = prune_batch(request, inputs, encoded)
    # The caller runs the model out of our sight, so this is the last moment at which a failed check can be raised.
    batch.checks.raise_if_failed()
    if batch.run is not None:
        raise PrunerError(
            f"pruner {request.pruner.name!r} drops inside the language model, which arguments alone cannot say: use "
            "`with gripvlm.pruned_run(model, inputs, pruner, keep) as (arguments, record):` and run the model inside, "
            "or use gripvlm.prune"
        )
    return (batch.arguments, Record(batch.selections, 1, batch.watch)) if return_record else batch.arguments


@contextmanager
def pruned_run(
    model: nn.Module,
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
        The arguments, and the `Record`, whose selections are complete once the block has ended. One prompt (batch) a
        block: what the first prefill chose stays. Logits of a direct `forward` are those of the tokens left at the
        end, and so is the cache: it is of no use after the block (see `gripvlm.prune` for chats). On an accelerator
        NaN from the encoder or in a pruner's scores is found when the block ends, as nothing waits before.
    """
    request = PruneRequest.of(
        model,
        pruner,
        keep,
        positions=positions,
        question=question,
        proportional_attention=proportional_attention,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    batch = prune_batch(request, inputs, encoded)
    record = Record(batch.selections, 1, batch.watch)
    try:
        with batch.running():
            yield batch.arguments, record
    finally:
        record.selections = batch.selections


def encode(model: nn.Module, inputs: Mapping[str, Any], pruners: Sequence[str | Pruner] = ()) -> Encoded:
    """Runs the vision encoder and projector once; reuse the result across prunings and questions.

    Args:
        model: a supported transformers model.
        inputs: what its processor returns: `input_ids` [B, L] (they say which images belong to which prompt) and the
            pixels.
        pruners: those that will prune it, where any needs attention or patches of the vision tower.

    Returns:
        `Encoded`, to pass as `prune_inputs(..., encoded=...)` with these inputs or with other questions about the
        same images; `encoded.take([0, 0, 1])` picks and repeats samples. Gradients flow as they would in `forward`:
        wrap the call in `torch.no_grad()` to stop them.

    Raises:
        UnsupportedModelError, InputError, PrunerError: see `prune_inputs`.
    """
    model = unwrapped(model)
    family = family_of(model)
    inputs = checked_inputs(model, family, inputs, None)
    needs = checked_needs(family, [checked_pruner(pruner, model) for pruner in pruners])
    prompts, watch = Prompts.of(model, inputs), Stopwatch(device_of(model))
    # Keys cost little, and with them the encoding serves every pruner that draws at random.
    encoded = adapter.encode(prompts, family, needs._replace(keys=True))
    watch.lap("vision")
    return replace(encoded, watch=watch)


def visual_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep: Keeps = 1.0,
    *,
    question: Question = None,
    encoded: Encoded | None = None,
) -> list[list[VisualTokens]]:
    """What pruners see of these inputs, with the fields that every family can fill: to train a scorer, or to look.

    Args, Raises: as for `prune_inputs`.

    Returns:
        A list (samples) of lists (images, in prompt order) of `VisualTokens`.
    """
    request = PruneRequest.of(model, _ReadEverything(), keep, question=question)
    inputs = checked_inputs(request.model, request.family, inputs, encoded)
    prompts, checks = Prompts.of(request.model, inputs), DeferredChecks()
    embeddings = question_embeddings(request, prompts)
    encoded = checked_encoding(request, inputs, encoded)
    if encoded is None:
        encoded = adapter.encode(prompts, request.family, request.needs)
    tokens = gather_tokens(request, prompts.with_images(encoded), embeddings, checks)
    checks.raise_if_failed()
    return tokens


class _ReadEverything(KeepAll):
    """Reads all fields that every family can fill."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "question", "key"})
