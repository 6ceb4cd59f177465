"""The text around the images: padding, special tokens, and what counts as the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError
from gripvlm.models.wrapped import device_of
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Question: TypeAlias = Tensor | Sequence[Any] | None
"""Token ids [t], embeddings [t, d], or a batch of either; None for the prompt's own text."""

VISUAL = ("image", "video")
SPECIAL = ("bos", "eos", "pad", "decoder_start", *VISUAL, "audio", "vision_start", "vision_end", "boi", "eoi")
"""Tokens that are no words, as config attributes without their ending "_token_id"."""


def placeholder(model: PreTrainedModel, modality: str) -> int:
    """The token id of the placeholder for one visual token in the prompt."""
    return int(getattr(model.config, f"{modality}_token_id"))


def visual_places(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, L] bool: the placeholders of images and videos among token ids."""
    names = [name for name in VISUAL if getattr(model.config, f"{name}_token_id", None) is not None]
    return torch.isin(ids, torch.tensor([placeholder(model, name) for name in names], device=ids.device))


def _token_ids(model: PreTrainedModel, name: str) -> list[int]:
    """All values of `<name>_token_id` in the model's configs, the generation config's first."""
    text = getattr(model.config, "text_config", None)
    ids: list[int] = []
    for config in (getattr(model, "generation_config", None), model.config, text):
        value = getattr(config, f"{name}_token_id", None)
        if isinstance(value, (list, tuple)):
            ids += value
        elif value is not None:
            ids.append(value)
    return ids


def padding_token(model: PreTrainedModel) -> int:
    """An id to pad with, never one that an encoder takes for a placeholder."""
    # An encoder's rows go to every placeholder in the ids: padding must be none of them.
    taken = {token for name in (*VISUAL, "audio") for token in _token_ids(model, name)}
    candidates = [*_token_ids(model, "pad"), *range(len(taken) + 1)]
    return next(token for token in candidates if token not in taken)


def full_mask(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] attention mask: the caller's, or what `generate` would infer from padding."""
    if (mask := inputs.get("attention_mask")) is not None:
        return mask
    ids, pad = inputs["input_ids"], _token_ids(model, "pad")[:1]
    # As transformers does: a pad token that is the end token as well says nothing about padding.
    if not pad or pad[0] in _token_ids(model, "eos"):
        return torch.ones_like(ids)
    return (ids != pad[0]).long()


def words(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] bool: tokens that are text, no padding and no begin, end or visual tokens."""
    ids = inputs["input_ids"]
    special = {token for name in SPECIAL for token in _token_ids(model, name)}
    # A copy: the mask may be the caller's own tensor.
    real = full_mask(model, inputs).to(torch.bool, copy=True)
    return real & ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device))


def questions(model: PreTrainedModel, inputs: Mapping[str, Any], question: Question) -> list[Tensor]:
    """[t, d] embeddings of each prompt's question, on the embedding table's device.

    Args:
        inputs: the prompts, ids and mask on the host.

    Raises:
        InputError: text instead of ids, ids outside the vocabulary, a width or a number of questions that does not
            fit.
    """
    ids, table = inputs["input_ids"], model.get_input_embeddings()
    if question is None:
        text = words(model, inputs)
        return list(_embed(table, ids[text]).split(text.sum(-1).tolist()))
    batch = _batch_of(question)
    if len(batch) != ids.shape[0]:
        raise InputError(f"{len(batch)} questions for {ids.shape[0]} prompts: pass one for each")
    return [_question(table, single) for single in batch]


def _batch_of(question: Tensor | Sequence[Any]) -> list[Any]:
    """A batched question as a list over samples; a single one as a list of one."""
    parts = question if isinstance(question, (list, tuple)) else ()
    if isinstance(question, str) or any(isinstance(part, str) for part in parts):
        raise InputError(
            "question is text, which only the tokenizer can read: pass "
            "question=tokenizer(text, add_special_tokens=False).input_ids"
        )
    if not isinstance(question, (Tensor, Sequence)):
        raise InputError(
            f"question is a {type(question).__name__}: pass token ids [t], embeddings [t, d], or a list with one of "
            "them for each prompt"
        )
    if isinstance(question, Tensor):
        single = question.ndim == (2 if question.is_floating_point() else 1)
    else:
        single = all(isinstance(part, int) for part in question)
    return [question] if single else list(question)


def _question(table: nn.Embedding, question: Tensor | Sequence[int]) -> Tensor:
    """[t, d] from ids [t] (negative ones are padding) or embeddings [t, d]."""
    vocabulary, width = table.weight.shape
    if not isinstance(question, Tensor):
        question = torch.tensor(list(question), dtype=torch.long)
    if question.is_floating_point():
        if question.ndim != 2 or question.shape[1] != width:
            raise InputError(f"question embeddings have shape {tuple(question.shape)}, expected (t, {width})")
        return question.to(device_of(table), table.weight.dtype)
    if question.ndim != 1:
        raise InputError(f"question ids have shape {tuple(question.shape)}, expected (t,)")
    # Checked on the host: an id outside the table takes an accelerator down.
    ids = question.cpu()
    ids = ids[ids >= 0]
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise InputError(
            f"question id {int(ids.max())} is outside the vocabulary of {vocabulary}: use the model's own tokenizer"
        )
    return _embed(table, ids)


def _embed(table: nn.Embedding, ids: Tensor) -> Tensor:
    return table(onto(ids, device_of(table)))
