"""Property tests: random prompts, image counts, sizes, budgets and paddings against the masked full model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gripvlm
from gripvlm.errors import PrunerError
from gripvlm.pruners import Pruner
from gripvlm.types import Selection, VisualTokens
from tiny_families import TINY, build, make
from tiny_families.reference import kept, masked

# newline rows and ordinary positions; joined tiles; blocks of images; M-RoPE with DeepStack and videos; M-RoPE
SCHEMES = ["llava_next", "idefics3", "gemma3", "qwen3_vl", "qwen2_vl"]


@dataclass(frozen=True, eq=False)
class Shared(Pruner):
    """Keeps random rows of all images of a prompt together, or `off` more than that."""

    name: ClassVar[str] = "shared"
    joint: ClassVar[bool] = True
    random: torch.Generator
    off: int = 0

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        found: dict[int, list[torch.Tensor]] = {}
        for sample in {tokens.sample for tokens in images}:
            mine = [tokens for tokens in images if tokens.sample == sample]
            total = sum(tokens.n for tokens in mine)
            order = torch.randperm(total, generator=self.random)
            chosen = torch.zeros(total, dtype=torch.bool)
            chosen[order[: sum(tokens.keep for tokens in mine) + self.off]] = True
            found[sample] = [part.nonzero().flatten() for part in chosen.split([tokens.n for tokens in mine])]
        return [Selection(found[tokens.sample].pop(0), tokens.n) for tokens in images]


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_budget_that_images_share_equals_masking(name, data, seed):
    """Also where an image loses all of its rows."""
    prompts = data.draw(st.lists(st.text("i", max_size=4), min_size=1, max_size=3).filter(any))
    model, batch = build(name), make(TINY[name], prompts, [len(prompt) + 2 for prompt in prompts], seed=seed)
    pruner = Shared(torch.Generator().manual_seed(seed))
    arguments, record = gripvlm.prune_inputs(model, batch.inputs, pruner, keep=1, return_record=True)
    assert [sum(s.k for s in sample) for sample in record.selections] == [len(sizes) for sizes in batch.sizes]
    real = kept(batch.inputs["input_ids"], batch.inputs["attention_mask"], record.selections)
    with torch.no_grad():
        ours = model(**arguments).logits[arguments["attention_mask"].bool()]
        theirs = model(**masked(model, batch.inputs, record.selections)).logits[real]
    torch.testing.assert_close(ours, theirs, atol=4e-5, rtol=4e-5)


def test_a_shared_budget_is_exact():
    model, batch = build("llava"), make(TINY["llava"], [2, 1], [5, 5])
    pruner = Shared(torch.Generator(), off=1)
    with pytest.raises(PrunerError, match="kept 9 tokens of the 2 images of sample 0, but their budget is exactly 8"):
        gripvlm.prune_inputs(model, batch.inputs, pruner, keep=4)


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_batch_any_budget_equals_masking(name, data, seed):
    kinds = "iv" if TINY[name].video else "i"
    prompts = data.draw(st.lists(st.text(kinds, max_size=3), min_size=1, max_size=3).filter(any))
    words = [data.draw(st.integers(len(prompt) + 1, 9)) for prompt in prompts]
    side = data.draw(st.sampled_from(["left", "right"]))
    model, batch = build(name), make(TINY[name], prompts, words, seed=seed, side=side)
    keep = [[data.draw(st.integers(1, n)) for n in sizes] for sizes in batch.sizes]
    arguments, record = gripvlm.prune_inputs(model, batch.inputs, "random", keep=keep, return_record=True)
    assert [[s.k for s in sample] for sample in record.selections] == keep
    real = kept(batch.inputs["input_ids"], batch.inputs["attention_mask"], record.selections)
    with torch.no_grad():
        ours = model(**arguments).logits[arguments["attention_mask"].bool()]
        theirs = model(**masked(model, batch.inputs, record.selections)).logits[real]
    torch.testing.assert_close(ours, theirs, atol=4e-5, rtol=4e-5)
