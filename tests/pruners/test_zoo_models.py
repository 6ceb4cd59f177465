"""Every pruner on real (tiny, random) models: exact counts, a ragged batch like its samples alone, sdpa like eager."""

from __future__ import annotations

import pytest
import torch

import gripvlm
from gripvlm.models import FAMILIES
from gripvlm.pruners import get_pruner, list_pruners
from tiny_families import TINY, build, make

SHALLOW = {"hiprune": "hiprune:middle=0", "vscan": "vscan:shallow=0,window=2", "vscan_vision": "vscan_vision:shallow=0"}
WRAPPED = ["ensemble(fastervlm,divprune)", "mmr(fopru)", "split(norm)", "spread(visionzip)"]
NOT_ALONE = {"given", "keep_all", "full", "grip", "relaxed", "ensemble", "mmr", "split", "spread"}
NOT_ALONE |= {"tome"}  # only where the tower can merge: tests/pruners/test_tome.py
SPECS = [SHALLOW.get(row.name, row.name) for row in list_pruners() if row.name not in NOT_ALONE]
SPECS += WRAPPED
ONCE = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
IMAGES, WORDS = [1, 2, 0], [7, 9, 5]


def chosen(name: str, spec: str, keep: float, attention: str = "sdpa", **only: int) -> list[list]:
    model, batch = build(name, attention), make(TINY[name], IMAGES, WORDS, **only)
    with gripvlm.prune(model, spec, keep=keep) as record:
        model.generate(**batch.inputs, **ONCE)
    for sample in record.selections:
        # Of a prompt: a pruner may move its budget between its images.
        asked = sum(gripvlm.Budget.of(keep).count(selection.n) for selection in sample)
        paid = sum(selection.paid for selection in sample)
        assert abs(paid - asked) <= (0 if get_pruner(spec).stage == "input" else 0.5 * len(sample))
    return [[selection.indices.tolist() for selection in sample] for sample in record.selections]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_every_pruner_in_a_ragged_batch(name, spec):
    """llava: CLS token; qwen2_5_vl: windows, merged patches, no CLS; internvl: pixel shuffle."""
    assert FAMILIES[name].vision is not None
    keep = 0.4 if get_pruner(spec).stage == "input" else 0.75
    together = chosen(name, spec, keep)
    assert together == [chosen(name, spec, keep, only=i)[0] for i in range(3)]
    assert together == chosen(name, spec, keep, "eager")


@pytest.mark.parametrize("spec", SPECS)
def test_every_budget_from_one_to_all(spec):
    model, inputs = build("llava"), make(TINY["llava"], [1], [5]).inputs
    if get_pruner(spec).stage == "input":
        keeps: list[int | float] = [1, 2, 3, 1.0]
    else:
        keeps = [0.6, 0.8, 1.0]
    encoded = gripvlm.encode(model, inputs, [spec])
    n = encoded.samples[0][0].features.shape[0]
    plain = model(**inputs).logits
    for keep in keeps:
        with torch.no_grad(), gripvlm.pruned_run(model, inputs, spec, keep, encoded=encoded) as (arguments, record):
            logits = model(**arguments).logits
        assert bool(logits.isfinite().all())
        if record.selections[0][0].k == n:
            torch.testing.assert_close(logits, plain, atol=0, rtol=0)
