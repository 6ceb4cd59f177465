"""The public calls: `prune`, and `prune_inputs`, `pruned_run`, `encode` and `visual_tokens` as functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from gripvlm.engine.block import PruneBlock
from gripvlm.engine.input_checks import checked_inputs
from gripvlm.engine.outputs import DeferredChecks
from gripvlm.engine.pipeline import encode_tokens, prune_batch
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
    """Inside the block, `model.generate` and `model(...)` are pruned; your code that calls them need not change.

        with gripvlm.prune(model, "divprune", keep=64) as record:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args:
        model, pruner, keep, positions, question, pad_to_multiple_of: as for `prune_inputs`.
        proportional_attention: weigh merged tokens by their size: log m is added to the attention scores of a token
            that m tokens were merged into (ToMe, arXiv 2210.09461, eq. 1). m counts the tokens, whatever their weights
            (`gripvlm.pruners.sizes_after`). The result is exact if the m tokens are equal and attend to one another,
            which they do not under a causal mask. Without merges nothing changes.

    Returns:
        A block, which yields the `Record` of the latest call.

    The output of `generate` begins with the original prompt's ids; stopping criteria, logits processors and streamers
    see them too, and `max_length` and `min_length` count them. The logits of `model(**inputs)` are those of the
    remaining tokens, `labels` lose the entries of dropped placeholders, and gradients flow. A call without any image
    runs unchanged.

    A further turn on the cache of a call (`return_dict_in_generate=True`, or a cache that you passed) continues from
    the kept tokens. It may use `generate` or `model(...)`. Pass the ids of the whole conversation, or only the new ids
    with a mask for the whole conversation. Outside of a block such a cache raises an error.

    Only this object's `generate` and `forward` are replaced, until the last block for the model ends, also after an
    exception. Each thread may open its own block for one model. A thread without a block uses the only open block; if
    several are open, its call is refused.

    Raises:
        GripError: a block for this model is already open in this thread; also the errors of `prune_inputs`. With
            `proportional_attention`, an `UnsupportedModelError` if the model's attention takes no bias for each key,
            and an `InputError` for a static cache.
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
        keep: a count per image, a fraction in (0, 1], or `"<=64"` for at most 64 (see `Budget`). Or a list with a value
            for each sample; the value may itself be a list with a value for each image. Only `keep_all` needs none.
        positions: "original" leaves every kept token at its position in the full prompt; "renumbered" closes the gaps,
            as if the dropped tokens had never been there.
        question: the question for pruners that read it, the same for all images of a prompt. Token ids [t],
            embeddings [t, d], a list with either for each of the B samples, or padded ids [B, t] (negative ids are
            padding) or embeddings [B, t, d]. Default: all text tokens of the prompt except padding, begin and end.
        encoded: the result of `encode`, to skip the vision encoder; `inputs` then need no pixels. A pruner that
            works inside the vision tower runs the encoder again, and needs the pixels.
        pad_to_multiple_of: pad the shortened prompt to a multiple of this length, so that few lengths occur and
            compiled code is reused.
        return_record: also return the `Record`.

    Returns:
        A dict with `input_ids`, `attention_mask` (always, 2D), `position_ids` (always), `mm_encoder_outputs`, and
        all other `inputs` that are not for the vision encoder. With `return_record`, (dict, Record).

    Raises:
        UnsupportedModelError: no support for this model, or none for this pruner on it.
        InputError: no image, a cache or embeddings instead of a full prompt, placeholders and images that do not
            match, a per-token input that gripvlm does not know.
        BudgetError: not a budget, or more than an image has.
        PrunerError: an unknown pruner, an invalid selection, or a pruner that drops inside the language model, which
            needs hooks and not only arguments (see `pruned_run`).

    Nothing is patched, and gradients flow through the kept features. Output ids and the cache are those of the
    shortened prompt. Your own decoding loop, or a further turn on the cache, must therefore pass `position_ids` that
    continue those of this prompt (`gripvlm.prune` does this itself). On models with M-RoPE the base model's
    `rope_deltas` are set, as transformers does for every prompt, so that the model can continue the positions.
    """
    request = PruneRequest.of(
        model, pruner, keep, positions=positions, question=question, pad_to_multiple_of=pad_to_multiple_of
    )
    batch = prune_batch(request, inputs, encoded)
    # The caller runs the model out of our sight, so this is the last moment at which a failed check can be raised.
    batch.checks.raise_if_failed()
    if batch.run is not None:
        raise PrunerError(
            f"pruner {request.pruner.name!r} drops inside the language model, which needs more than arguments: use "
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
    """`prune_inputs` for every pruner, also inside the language model; run the model inside the block.

        with gripvlm.pruned_run(model, inputs, "fastv", keep=192) as (arguments, record):
            logits = model(**arguments).logits          # or model.generate(**arguments)

    Args, Raises: as for `prune_inputs`, and `proportional_attention` as for `prune`.

    Yields:
        The arguments, and the `Record`, whose selections are complete once the block has ended. Use a block for one
        batch of prompts: the selection of its first prefill is final. The logits of a direct `forward`, and the cache,
        have only the tokens that are left, so the cache cannot be used after the block (for chats see `gripvlm.prune`).
        On an accelerator NaN from the encoder or in a pruner's scores raises an error when the block ends, because
        nothing waits for the device before.
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
        pruners: the pruners that will use the encoding; needed if one reads attention or patches of the vision tower.

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
    """The `VisualTokens` that pruners get for these inputs, with the fields that every family has.

    Args, Raises: as for `prune_inputs`.

    Returns:
        A list (samples) of lists (images, in prompt order) of `VisualTokens`.
    """
    request = PruneRequest.of(model, _ReadEverything(), keep, question=question)
    checks = DeferredChecks()
    _, tokens = encode_tokens(request, inputs, encoded, Stopwatch(device_of(request.model)), checks)
    checks.raise_if_failed()
    return tokens


class _ReadEverything(KeepAll):
    """Reads all fields that every family can fill."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "question", "key"})
