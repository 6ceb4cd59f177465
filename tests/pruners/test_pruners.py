"""What every pruner must do, on bare tensors; what each one computes is in the files beside this one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gripvlm.engine.outputs import checked_selection
from gripvlm.pruners import get_pruner, list_pruners, top_k
from gripvlm.pruners.input.fastervlm import FasterVLM
from gripvlm.pruners.input.fopru import FoPru
from gripvlm.pruners.input.hired import HiRED
from gripvlm.pruners.llm.ptp import PTPVision
from gripvlm.types import VisionRows, VisualTokens
from pruner_inputs import image

NOT_ALONE = {
    "given",
    "keep_all",
    "full",
    "grip",
    "ensemble",
    "gumbel",
    "mmr",
    "restore",
    "split",
    "spread",
    "top_p",
}  # need scores, all rows, a pruner; top_p may keep more than its budget


WRAPPED = ["ensemble(norm,divprune)", "mmr(norm)", "restore(divprune)", "split(norm)", "spread(divprune)"]


CHOOSING = sorted({row.name for row in list_pruners() if row.stage == "input"} - NOT_ALONE) + WRAPPED


@pytest.mark.parametrize("name", CHOOSING)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
def test_exactly_k_ascending_unique_and_repeatable(name, data, h, w, seed):
    k = data.draw(st.integers(1, h * w))
    given_tokens = image(h, w, k, seed)
    first, again = (get_pruner(name).select(given_tokens) for _ in range(2))
    assert first.n == h * w
    assert first.k == k == int(first.mask().sum())
    assert first.indices.dtype == torch.long
    assert bool((first.indices.diff() > 0).all())
    assert int(first.indices[0]) >= 0
    assert int(first.indices[-1]) < h * w
    assert torch.equal(first.indices, again.indices)
    checked_selection(name, first, given_tokens, "here")
    if k == h * w:
        assert first.indices.tolist() == list(range(k))


@pytest.mark.parametrize("name", ["divprune", "norm"])
@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 99), data=st.data())
def test_content_pruners_choose_the_same_rows_in_any_order(name, n, seed, data):
    """Shuffling the rows shuffles the choice and nothing else."""
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 8, generator=generator)
    shuffle = torch.randperm(n, generator=generator)
    if name == "divprune":  # two tokens may be each other's nearest: then the index decides who is first
        unit = torch.nn.functional.normalize(features, dim=-1)
        first, second = (unit @ unit.T - 9 * torch.eye(n)).amax(dim=1).topk(2, largest=False).values
        assume(float(second - first) > 1e-5)
    plain = get_pruner(name).select(VisualTokens(features, k)).indices
    shuffled = get_pruner(name).select(VisualTokens(features[shuffle], k)).indices
    assert sorted(shuffle[shuffled].tolist()) == plain.tolist()


@pytest.mark.parametrize("name", CHOOSING)
def test_half_precision_features_are_fine(name):
    full = image(6, 6, 7)
    assert full.question is not None
    half = replace(full, features=full.features.bfloat16(), question=full.question.bfloat16())
    assert get_pruner(name).select(half).k == 7


@pytest.mark.parametrize(
    "name", [row.name for row in list_pruners() if "vision_attention" in row.needs and row.stage == "input"]
)
def test_towers_without_cls_and_keys_are_fine(name):
    full = image(6, 6, 7)
    bare = replace(full, vision={layer: VisionRows(rows.received) for layer, rows in full.vision.items()})
    assert checked_selection(name, get_pruner(name).select(bare), bare, "here").k == 7


def test_top_k_is_stable():
    assert top_k(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]
    assert top_k(torch.zeros(6), 3).tolist() == [0, 1, 2]
    assert top_k(torch.tensor([-torch.inf, 2.0, torch.inf]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("pruner", [FasterVLM(), FoPru(), PTPVision(), HiRED()])
def test_one_ranking_serves_every_budget(pruner):
    sets = [set(pruner.select(image(4, 4, k)).indices.tolist()) for k in range(1, 17)]
    assert all(few < many for few, many in pairwise(sets))
