"""Queries and keys of the first layer ahead of its run, against those that it makes where all positions are 0."""

from __future__ import annotations

import pytest
import torch

from gripvlm.errors import UnsupportedModelError
from gripvlm.models.first_layer import checked_first_layer, first_keys, first_queries
from gripvlm.models.hooks.attention import modules_of
from gripvlm.models.hooks.calls import call_hooks
from matrix import NAMES, NO_FIRST_LAYER
from tiny_families import build


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_FIRST_LAYER])
def test_they_are_the_layers_own(name):
    """Rotation by 0 leaves them as they are, but for a factor that some models stretch them by."""
    model = build(name)
    decoder, calls = model.get_decoder(), []
    checked_first_layer(model, "this test reads")
    ids = torch.arange(5, 12)[None]
    rows = model.get_input_embeddings()(ids)
    zeros = torch.zeros_like(ids)
    with call_hooks(attention=dict.fromkeys(modules_of(decoder, [0]), calls.append)), torch.no_grad():
        decoder(input_ids=ids, position_ids=zeros, use_cache=False)
    query, key = calls[0].query[0].transpose(0, 1), calls[0].key[0].transpose(0, 1)
    ours = first_queries(model, rows[0]), first_keys(model, rows[0])
    heads = query.shape[1]
    for mine, theirs in zip(ours, (query, key.repeat_interleave(heads // key.shape[1], dim=1)), strict=True):
        assert mine.shape == theirs.shape
        factor = theirs.norm() / mine.norm()
        torch.testing.assert_close(mine * factor, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name in NO_FIRST_LAYER])
def test_other_first_layers_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"^pruner 'hawk' needs queries and keys of the language model's"):
        checked_first_layer(build(name), "pruner 'hawk' needs")
