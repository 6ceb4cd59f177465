"""Queries and keys of the language model's first layer, of rows that it has not run on yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gripvlm.errors import UnsupportedModelError
from gripvlm.models.wrapped import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
"""Of queries and keys, where a model has them; by the names that transformers gives them."""


def checked_first_layer(model: PreTrainedModel, wants: str) -> Any:
    """The attention of the first layer, known to make queries and keys of the embeddings themselves.

    Raises:
        UnsupportedModelError: beginning with `wants`: the first layer is recurrent, compresses its keys, or is entered
            by something else than the embeddings.
    """
    layer = model.get_decoder().layers[0]
    attention = getattr(layer, "self_attn", None)
    # Gemma 3n's layers mix several streams before they attend.
    plain = hasattr(layer, "input_layernorm") and not hasattr(layer, "altup")
    if not plain or not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "o_proj", "head_dim")):
        raise UnsupportedModelError(
            f"{wants} queries and keys of the language model's first layer, but that of {model.config.model_type} does "
            "not make them of the embeddings alone: use a pruner that reads features only"
        )
    return attention


def first_queries(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """[t, H, d_h] of embeddings [t, d], ahead of rotary positions."""
    return _projected(model, embeddings, 0)


def first_keys(model: PreTrainedModel, features: Tensor) -> Tensor:
    """[n, H, d_h] of features [n, d], ahead of rotary positions: for each query head, of the key head that it reads."""
    keys, attention = _projected(model, features, 1), model.get_decoder().layers[0].self_attn
    heads = attention.q_proj.out_features // attention.head_dim
    return keys.repeat_interleave(heads // keys.shape[1], dim=1)


@torch.no_grad()
def _projected(model: PreTrainedModel, rows: Tensor, part: int) -> Tensor:
    """Queries (`part` 0) or keys (1) [m, heads, d_h] of rows [m, d], on the rows' device."""
    layer = model.get_decoder().layers[0]
    attention = layer.self_attn
    projection = (attention.q_proj, attention.k_proj)[part]
    made = projection(layer.input_layernorm(rows.to(device_of(layer.input_layernorm))))
    for names in NORMS:
        if (norm := getattr(attention, names[part], None)) is not None:
            # Over each head, or over all of them: its weights say so.
            made = norm(made.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)
    return made.unflatten(-1, (-1, attention.head_dim)).to(rows.device)
