"""Sliding windows smaller than the prompt: transformers counts a window in tokens that are there.

So a pruned run is the full model whose window counts kept tokens only, not the full model with
dropped keys masked. The reference here gives each layer that mask, key by key, in 4D.
"""

from __future__ import annotations

import pytest
import torch

import gripvlm
from tiny_families import TINY, build, make
from tiny_families.base import IMAGE
from tiny_families.reference import full_positions, kept, masked, teacher_forced

WINDOW = 6
SLIDING, FULL = "sliding_attention", "full_attention"
BLOCKS = {
    "gemma3": (SLIDING, FULL),
    "gemma4": (SLIDING,),
    "gemma4_unified": (SLIDING, FULL),
    "gemma3n": (),
    "cohere2_vision": (),
}
"""family -> the kinds of layers in which the tokens of an image see each other in both directions."""

GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def window_over_kept(ids: torch.Tensor, keep: torch.Tensor, blocks: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """{layer type: [B, 1, L, L] bool}: causal or in one image block, and within the window of kept tokens.

    `keep` [B, L] says which tokens are there; each image is one run of placeholders, whose tokens
    see each other in the kinds of layers that `blocks` names.
    """
    length = ids.shape[1]
    starts = (ids == IMAGE) & (torch.nn.functional.pad(ids, (1, 0))[:, :-1] != IMAGE)
    block = torch.where(ids == IMAGE, starts.cumsum(-1), 0)
    one_block = (block[:, :, None] == block[:, None, :]) & (block[:, :, None] > 0)
    causal = torch.ones(length, length).tril().bool()
    count = keep.cumsum(-1)
    near = {SLIDING: count[:, :, None] - count[:, None, :] < WINDOW, FULL: torch.ones_like(causal)}
    seen = {kind: causal | one_block if kind in blocks else causal for kind in near}
    return {kind: (seen[kind] & near[kind] & keep[:, None, :])[:, None] for kind in near}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_window_counts_kept_tokens(name, attention):
    model, batch = build(name, attention, sliding_window=WINDOW), make(TINY[name], [1, 2], [7, 9])
    inputs = batch.inputs
    arguments, record = gripvlm.prune_inputs(model, inputs, "random", keep=5, return_record=True)
    assert arguments["input_ids"].shape[1] > WINDOW
    keep = kept(inputs["input_ids"], inputs["attention_mask"], record.selections)
    allowed = window_over_kept(inputs["input_ids"], keep, BLOCKS[name])
    floor = torch.finfo(torch.float32).min
    masks = {kind: torch.where(sees, 0.0, floor) for kind, sees in allowed.items()}
    with torch.no_grad():
        ours = model(**arguments).logits[arguments["attention_mask"].bool()]
        full = inputs | {"attention_mask": masks, "position_ids": full_positions(model, inputs)}
        theirs = model(**full).logits[keep]
        plain = model(**masked(model, inputs, record.selections)).logits[keep]
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)
    assert (ours - plain).abs().max() > 0.1  # plain masking counts the window otherwise


@pytest.mark.parametrize("name", BLOCKS)
def test_what_else_holds_with_a_small_window(name):
    """Keeping all is bit for bit the same, a batch is its samples, decoding goes on where prefill ended."""
    model, images, words = build(name, sliding_window=WINDOW), [1, 2, 0], [7, 9, 5]
    inputs = make(TINY[name], images, words).inputs
    plain = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=1.0):
        everything = model.generate(**inputs, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(everything.logits, plain.logits, strict=True))
    with gripvlm.prune(model, "random", keep=5):
        together = model.generate(**inputs, **GREEDY)
        for sample in range(3):
            alone = model.generate(**make(TINY[name], images, words, only=sample).inputs, **GREEDY)
            for a, b in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(a[0], b[sample], atol=3e-5, rtol=3e-5)
    arguments = gripvlm.prune_inputs(model, inputs, "random", keep=5)
    once = teacher_forced(model, arguments, together.sequences[:, -4:])
    for a, b in zip(together.logits, once, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)
