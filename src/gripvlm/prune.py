"""`prune` and `prune_inputs`: any pruner on any supported model, checked here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gripvlm.budget import Budget, Keep
from gripvlm.errors import BudgetError, GripError, InputError, PrunerError
from gripvlm.models import decoding, seam
from gripvlm.models.families import Family, family_of
from gripvlm.models.seam import Encoded, Span
from gripvlm.pruners import Pruner, Selection, VisualTokens, get_pruner
from gripvlm.pruners.base import NEEDS

__all__ = ["Record", "encode", "prune", "prune_inputs"]

Question: TypeAlias = Tensor | Sequence[Any] | None
Keeps: TypeAlias = Keep | Sequence[Keep | Sequence[Keep]] | None

_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass
class Record:
    """What happened in the latest call.

    Attributes:
        selections: a list (samples) of lists (images, in prompt order) of `Selection`; the list of a
            prompt without images is empty.
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
    inputs = _checked_inputs(model, inputs, None)
    started = _now(model)
    encoded = seam.encode(model, family, inputs)
    return replace(encoded, seconds=_now(model) - started)


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
            sample, or with one list per sample that has one per image. Only `keep_all` does without.
        positions: "original" leaves every kept token at its position in the full prompt;
            "renumbered" counts anew, as if the dropped tokens had never been.
        question: what pruners that read the question get, the same for all images of a prompt: token
            ids [t], embeddings [t, d], or a list of B of either ([B, t] ids and [B, t, d] embeddings
            also do; negative ids are padding). By default all text tokens of the prompt that are not
            padding, begin, end or visual tokens, as far as the model's configs tell.
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

    Nothing is patched and the model is not changed. Gradients flow through the kept features.
    """
    family = family_of(model)
    chooser = _checked_pruner(pruner)
    inputs = _checked_inputs(model, inputs, encoded)
    arguments, record = _pruned(
        model, family, inputs, chooser, keep, positions, question, encoded, spare_column=False
    )
    return (arguments, record) if return_record else arguments


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
    chooser = _checked_pruner(pruner)
    _checked_positions(positions)
    if not isinstance(keep, (list, tuple)):
        _budget(chooser, keep)
    before = vars(model).get("generate")
    if getattr(before, "_gripvlm", False):
        raise GripError(
            "this model is already inside a gripvlm.prune block: leave that block first, or prune "
            "another model"
        )
    record = Record()
    original = model.generate

    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if not any(kwargs.get(name) is not None for name in _PIXELS):
            rows = kwargs["input_ids"].shape[0] if "input_ids" in kwargs else 0
            record.selections = [[] for _ in range(rows)]
            record.seconds = {"vision": 0.0, "pruner": 0.0, "surgery": 0.0}
            record.calls += 1
            return original(None, *args, **kwargs)
        options = decoding.Options(model, args, kwargs)
        options.refuse()
        given = _checked_inputs(model, kwargs, None)
        with torch.no_grad():
            arguments, now = _pruned(
                model, family, given, chooser, keep, positions, question, None, options.uncached
            )
        options.check_beams(arguments, now.selections)
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
    _checked_positions(positions)
    started = _now(model)
    fresh = encoded is None
    if encoded is None:
        encoded = seam.encode(model, family, inputs)
    elif encoded.model_type != family.model_type:
        raise InputError(
            f"encoded by a {encoded.model_type} model, but this is {family.model_type}"
        )
    seen = _now(model)
    spans = seam.locate(model, inputs["input_ids"], encoded)
    if not any(spans):
        raise InputError("no prompt has an image: there is nothing to prune")
    budgets = _budgets(pruner, keep, spans)
    needs_question = "question" in pruner.needs
    questions = _questions(model, family, inputs, question) if needs_question else None
    pruning = 0.0
    selections: list[list[Selection]] = []
    for sample, (mine, asked) in enumerate(zip(spans, budgets, strict=True)):
        selections.append([])
        for image, (span, budget) in enumerate(zip(mine, asked, strict=True)):
            where = f"{span.item.modality} {image} of sample {sample}"
            tokens = VisualTokens(
                features=span.item.features,
                keep=budget.count(span.item.features.shape[0], where),
                grid=span.item.grid,
                question=questions[sample] if questions is not None else None,
                sample=sample,
                image=image,
                key=span.item.key,
            )
            if "grid" in pruner.needs and tokens.grid is None:
                raise PrunerError(
                    f"pruner {pruner.name!r} needs rows in a plain raster, which {family.model_type} "
                    f"gives none for {where} ({tokens.n} tokens): use one that needs features only"
                )
            asked_at = _now(model)
            selection = pruner.select(tokens)
            pruning += _now(model) - asked_at
            selections[-1].append(_checked_selection(pruner.name, selection, tokens, where))
    arguments = seam.shorten(model, inputs, encoded, spans, selections, positions, spare_column)
    vision = seen - started
    seconds = {"vision": vision, "pruner": pruning, "surgery": _now(model) - seen - pruning}
    if not fresh:
        seconds["vision"] = 0.0
    return arguments, Record(selections, 1, seconds)


def _now(model: Any) -> float:
    """Seconds on a steady clock, after the model's device has done all it was asked."""
    device = model.device
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()


def _budget(pruner: Pruner, keep: Any) -> Budget:
    if keep is None:
        keep = getattr(pruner, "default_keep", None)
    if keep is None:
        raise BudgetError(
            f"pruner {pruner.name!r} needs a budget: type keep=64 (tokens an image) or keep=0.1"
        )
    return Budget.of(keep)


def _budgets(pruner: Pruner, keep: Keeps, spans: Sequence[Sequence[Span]]) -> list[list[Budget]]:
    """One budget an image, whatever form `keep` came in."""
    if not isinstance(keep, (list, tuple)):
        budget = _budget(pruner, keep)
        return [[budget] * len(mine) for mine in spans]
    if len(keep) != len(spans):
        raise BudgetError(f"keep has {len(keep)} entries for {len(spans)} samples")
    budgets = []
    for sample, (mine, asked) in enumerate(zip(spans, keep, strict=True)):
        each = list(asked) if isinstance(asked, (list, tuple)) else [asked] * len(mine)
        if len(each) != len(mine):
            raise BudgetError(
                f"keep[{sample}] has {len(each)} entries for the {len(mine)} images of that sample"
            )
        budgets.append([_budget(pruner, one) for one in each])
    return budgets


def _questions(
    model: Any, family: Family, inputs: Mapping[str, Any], question: Question
) -> list[Tensor]:
    """[t, d] embeddings of each sample's question."""
    ids, mask = inputs["input_ids"], seam.full_mask(model, inputs).bool()
    if question is None:
        special = torch.tensor(sorted(seam.special_ids(model, family)), device=ids.device)
        words = mask & ~torch.isin(ids, special)
        return [seam.embed(model, row[word]) for row, word in zip(ids, words, strict=True)]
    batch = ids.shape[0]
    if isinstance(question, str) or (
        isinstance(question, (list, tuple)) and any(isinstance(q, str) for q in question)
    ):
        raise InputError(
            "question is text, which only the tokenizer can read: pass question="
            "tokenizer(text, add_special_tokens=False).input_ids"
        )
    if isinstance(question, Tensor):
        single = question.ndim == (2 if question.is_floating_point() else 1)
        each: list[Any] = [question] if single else list(question)
    else:
        each = [list(question)] if all(isinstance(q, int) for q in question) else list(question)
    if len(each) == 1 and batch > 1:
        each *= batch
    if len(each) != batch:
        raise InputError(f"{len(each)} questions for {batch} prompts")
    return [_question(model, one) for one in each]


def _question(model: Any, question: Any) -> Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    one = question if isinstance(question, Tensor) else torch.tensor(question, dtype=torch.long)
    if one.is_floating_point():
        if one.ndim != 2 or one.shape[1] != width:
            raise InputError(
                f"question embeddings have shape {tuple(one.shape)}, expected (t, {width})"
            )
        return one.to(model.get_input_embeddings().weight)
    if one.ndim != 1:
        raise InputError(f"question ids have shape {tuple(one.shape)}, expected (t,)")
    one = one[one >= 0]
    if one.numel() and int(one.max()) >= vocabulary:
        raise InputError(
            f"question id {int(one.max())} is outside the vocabulary of {vocabulary}: "
            "use the model's own tokenizer"
        )
    return seam.embed(model, one)


# --- checks -------------------------------------------------------------------------------------


def _checked_positions(positions: str) -> None:
    if positions not in ("original", "renumbered"):
        raise InputError(f"positions={positions!r}: type 'original' or 'renumbered'")


def _checked_pruner(pruner: str | Pruner) -> Pruner:
    chooser = get_pruner(pruner)
    name = getattr(chooser, "name", type(chooser).__name__)
    if not isinstance(getattr(chooser, "needs", None), frozenset):
        raise PrunerError(
            f"pruner {name!r} states no needs: give it needs = frozenset({{'features'}})"
        )
    if unknown := sorted(chooser.needs - NEEDS):
        raise PrunerError(f"pruner {name!r} needs {unknown}, but known are {sorted(NEEDS)}")
    if getattr(chooser, "stage", "input") != "input":
        raise PrunerError(
            f"pruner {name!r} drops rows at stage {chooser.stage!r}, but only 'input' is supported"
        )
    return chooser


def _checked_inputs(
    model: Any, inputs: Mapping[str, Any], encoded: Encoded | None
) -> dict[str, Any]:
    """The inputs as a dict without None, or an `InputError` that says what is wrong with them."""
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs are a {type(inputs).__name__}: pass what the processor returns")
    given = {name: value for name, value in inputs.items() if value is not None}
    if "inputs_embeds" in given:
        raise InputError("inputs_embeds hide where the images are: pass input_ids and pixel_values")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError("input_ids must be a tensor of token ids [B, L]: use return_tensors='pt'")
    if (cache := given.get("past_key_values")) is not None and cache.get_seq_length() > 0:
        raise InputError(
            "past_key_values already hold tokens: pass the full prompt and no cache; each turn of a "
            "chat selects anew"
        )
    if encoded is None and not any(name in given for name in _PIXELS):
        raise InputError(
            "no image: inputs have no pixel_values; without images call the model without gripvlm"
        )
    for name in ("attention_mask", "labels"):
        if name in given and given[name].shape != ids.shape:
            raise InputError(
                f"{name} has shape {tuple(given[name].shape)}, expected that of input_ids, "
                f"{tuple(ids.shape)}"
            )
    visual = seam.encoder_arguments(model, given)
    for name, value in given.items():
        if name in seam.PER_TOKEN or name in visual or not isinstance(value, Tensor):
            continue
        if value.shape[:2] == ids.shape:
            raise InputError(
                f"{name} has one entry a prompt token, and gripvlm does not know how to shorten it: "
                f"leave it out, or pass it after prune_inputs"
            )
    return given


def _checked_selection(name: str, selection: Any, tokens: VisualTokens, where: str) -> Selection:
    """The selection on the features' device, or a `PrunerError` that names the pruner."""

    def wrong(what: str) -> PrunerError:
        return PrunerError(f"pruner {name!r} on {where}: {what}")

    if not isinstance(selection, Selection):
        raise wrong(f"select() returned a {type(selection).__name__}, expected a Selection")
    device, n, k = tokens.features.device, tokens.n, tokens.keep
    scores = selection.scores
    if scores is not None:
        if scores.shape != (n,):
            raise wrong(f"scores have shape {tuple(scores.shape)}, expected ({n},)")
        if bool(scores.isnan().any()):
            raise wrong(f"{int(scores.isnan().sum())} of {n} scores are NaN")
        scores = scores.to(device)
    indices = selection.indices
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype != torch.long:
        got = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else indices
        raise wrong(f"indices must be a LongTensor [k], got {got}")
    if indices.numel() != k:
        raise wrong(f"returned {indices.numel()} indices, but the budget is exactly {k} of {n}")
    if selection.n != n:
        raise wrong(f"says n={selection.n}, but there are {n} visual tokens")
    indices = indices.to(device)
    if int(indices.min()) < 0 or int(indices.max()) >= n:
        raise wrong(f"indices reach {int(indices.min())}..{int(indices.max())}, allowed 0..{n - 1}")
    if bool((indices.diff() <= 0).any()):
        raise wrong("indices must be ascending, without duplicates: end with indices.sort().values")
    merge = selection.merge
    if merge is not None:
        sums = torch.zeros(k, device=device)
        lengths = {merge.source.numel(), merge.destination.numel(), merge.weight.numel()}
        if len(lengths) != 1:
            raise wrong("merge.source, merge.destination and merge.weight differ in length")
        source, destination = merge.source.to(device), merge.destination.to(device)
        if bool(((source < 0) | (source >= n)).any()):
            raise wrong(f"merge.source leaves the rows 0..{n - 1}")
        if bool(((destination < 0) | (destination >= k)).any()):
            raise wrong(f"merge.destination leaves the kept slots 0..{k - 1}")
        sums.index_add_(0, destination, merge.weight.to(device, torch.float32))
        if not torch.allclose(sums[destination], torch.ones_like(sums[destination]), atol=1e-3):
            raise wrong("merge.weight must sum to 1 over each destination")
    return replace(selection, indices=indices, scores=scores)
