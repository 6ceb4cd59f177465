"""What several pruners read off attention, of the vision tower and of the language model."""

from __future__ import annotations

from torch import Tensor

from gripvlm.types import LLMTokens, VisualTokens


def cls_attention(tokens: VisualTokens, layer: int) -> Tensor:
    """[n] attention of the vision tower's CLS token in `layer`, the mean over heads.

    In towers without a CLS token, the attention that each token receives, the mean over queries too.
    """
    rows = tokens.vision[layer]
    return (rows.received if rows.cls is None else rows.cls).float().mean(dim=0)


def received_attention(tokens: VisualTokens, layer: int) -> Tensor:
    """[n] attention received in `layer` of the vision tower, the mean over heads and queries."""
    return tokens.vision[layer].received.float().mean(dim=0)


def tower_keys(tokens: VisualTokens, layer: int) -> Tensor:
    """[n, d_h] keys in `layer` of the vision tower, the mean over heads; the projected rows where it shows no keys."""
    keys = tokens.vision[layer].keys
    return (tokens.features if keys is None else keys).float()


def last_token_attention(tokens: LLMTokens) -> Tensor:
    """[n] attention of the prompt's last token in the layer before, the mean over heads. Needs "last"."""
    assert tokens.last is not None
    return tokens.last.float().mean(dim=0)


def text_attention(tokens: LLMTokens) -> Tensor:
    """[H, r, n], r >= 1: attention of the text after the image in the layer before; of the last token if there is none.

    Needs "question" and "last". Text ahead of the image does not see it: a ranking by its attention would be all ties.
    """
    assert tokens.question is not None
    assert tokens.after is not None
    assert tokens.last is not None
    return tokens.question[:, tokens.after] if bool(tokens.after.any()) else tokens.last[:, None]
