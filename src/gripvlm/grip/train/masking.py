"""Soft selection inside the language model: a bias on attention to each visual token, with gradients.

`log(m)` added to every query's score for a visual token multiplies its attention weight by m before
normalisation, as DynamicViT (arXiv 2106.02034, eq. 11) does: at m in {0, 1} it is exactly dropping or keeping,
and unlike scaling the feature it cannot be undone by a normalisation layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gripvlm.errors import UnsupportedModelError
from gripvlm.grip.train.rollout import Batch, Engine
from gripvlm.models.families import chunkable, family_of
from gripvlm.models.hooks.llm_drop import checked_keys

__all__ = ["forced_log_probs", "masked_forward"]


def masked_forward(engine: Engine, batch: Batch, biases: Sequence[Tensor]) -> Tensor:
    """Log-probabilities [B, T] of the forced answers, differentiable in the biases.

    Args:
        biases: one [n] for each image of the batch, in order: log of the share of attention it keeps.

    Returns:
        [B, T], 0 at padding.

    Raises:
        UnsupportedModelError: an attention implementation that takes no bias key by key, sliding windows, or a
            model whose images attend in both directions.
    """
    model = engine.model
    text = model.get_decoder().config
    checked_keys(model, "soft masks need attention with a bias on each key")
    if getattr(text, "sliding_window", None):
        raise UnsupportedModelError(
            f"soft masks do not know sliding windows, which {text.model_type} has: train with stage grpo, and with a "
            "teacher other than gradient"
        )
    if not chunkable(family_of(model), model):
        raise UnsupportedModelError(
            f"soft masks are causal, and {model.config.model_type} images attend in both directions: train with "
            "stage grpo, and with a teacher other than gradient"
        )
    with torch.no_grad():
        arguments = engine.whole(batch)
    if torch.is_grad_enabled() and any(bias.requires_grad for bias in biases):
        _with_gradients(arguments)
    mask = arguments["attention_mask"].bool()
    length = mask.shape[1]
    lowest = torch.finfo(model.dtype).min
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    open_ = causal & mask[:, None]
    open_ |= torch.eye(length, dtype=torch.bool, device=mask.device)  # padding sees itself, or it would be NaN
    bias = torch.zeros(mask.shape, device=mask.device)
    places = engine.places(batch)
    row = torch.cat([torch.full_like(positions, i) for i, positions in places])
    column = torch.cat([positions for _, positions in places])
    bias = bias.index_put((row, column), torch.cat([b.float() for b in biases]))
    full = torch.where(open_, bias[:, None], torch.tensor(lowest, device=mask.device))[:, None]
    # A visual token always sees itself fully: a dropped token's own row is read by nobody, and must not be NaN.
    own = torch.eye(length, dtype=torch.bool, device=mask.device)
    full = torch.where(own, torch.zeros((), device=mask.device), full).to(model.dtype)
    arguments["attention_mask"] = full
    return forced_log_probs(engine, batch, arguments)


def _with_gradients(arguments: dict[str, Any]) -> None:
    """Images' rows that ask for gradients, so that queries, keys and values of the first layer do too.

    torch's memory-efficient attention keeps what its backward needs where one of those three asks for gradients, and
    does not look at the bias (pytorch/pytorch#148476): with frozen weights, backward would fail in the first layer.
    """
    for output in arguments["mm_encoder_outputs"].values():
        rows = output.pooler_output  # detached: the rows themselves are the batch's, and stay as they are
        one = isinstance(rows, Tensor)
        output.pooler_output = (
            rows.detach().requires_grad_() if one else [each.detach().requires_grad_() for each in rows]
        )


def forced_log_probs(engine: Engine, batch: Batch, arguments: dict[str, Any]) -> Tensor:
    """[B, T] log-probabilities of the forced answers that end the prompts of `arguments`, 0 at padding."""
    width = batch.longest
    with torch.autocast(engine.model.device.type, torch.bfloat16, enabled=engine.bf16):
        logits = engine.model(**arguments, use_cache=False).logits[:, -width - 1 : -1].float()
    targets = batch.inputs["labels"][:, -width:]
    log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return log_probs.masked_fill(targets < 0, 0.0)
