"""Weights of heads: by hand, and against a model whose output projection lacks a head's columns."""

from __future__ import annotations

import pytest
import torch

from gripvlm import lab
from gripvlm.errors import InputError
from gripvlm.eval import evaluate
from gripvlm.eval.heads import head_weights, importances

TASKS, LIMIT = ["lab/diagram", "lab/reading"], 12


def test_importances_by_hand():
    """Heads x tasks. The first task loses .3, .1 and .1: .2, 0 and 0 above the least. The third says nothing."""
    losses = [[0.3, -0.1, 0.2], [0.1, 0.0, 0.2], [0.1, 0.2, 0.2]]
    assert importances(losses) == pytest.approx((1 / 2, 1 / 8, 3 / 8))
    with pytest.raises(InputError, match="no head changes the score of any task"):
        importances([[0.1], [0.1]])


def test_a_head_that_is_turned_off_is_out_of_the_output_projection():
    model, processor = lab.load()
    found = head_weights(model, processor, TASKS, LIMIT)

    def scores() -> list[float]:
        rows = evaluate(model, processor, TASKS, [], limit=LIMIT, blind=False)["rows"]
        return [row["score"] for row in rows]

    weight = model.get_decoder().layers[0].self_attn.o_proj.weight
    own, whole, losses = weight.detach().clone(), scores(), []
    for columns in torch.arange(weight.shape[1]).split(weight.shape[1] // len(found)):
        with torch.no_grad():
            weight[:, columns] = 0
        losses.append([a - b for a, b in zip(whole, scores(), strict=True)])
        with torch.no_grad():
            weight.copy_(own)
    assert scores() == whole
    assert found == pytest.approx(importances(losses))
    assert sum(found) == pytest.approx(1)
