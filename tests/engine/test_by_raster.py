"""Pruners that need a grid on an image of two rasters: cases by hand. tests/pruners/test_matrix.py has every pruner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import gripvlm
from gripvlm.engine.by_raster import select_at_layer, select_batch
from gripvlm.engine.outputs import DeferredChecks
from gripvlm.errors import PrunerError
from gripvlm.pruners import LLMPruner, Pruner, get_pruner
from gripvlm.types import LLMTokens, Merge, Raster, Selection, VisionRows, VisualTokens
from tiny_families import TINY, build, make

WHOLE, LINES = Raster(0, 2, 2, 2), Raster(4, 2, 3, 4)  # rows 7 and 11 are newlines
N = 12


def image(keep: int) -> VisualTokens:
    rows = torch.arange(N, dtype=torch.float32)[:, None].expand(-1, 3)
    seen = VisionRows(rows[:, 0].expand(2, -1), keys=rows)
    return VisualTokens(rows, keep, rasters=(WHOLE, LINES), vision={-2: seen}, patches=rows, key=5)


def selected(pruner: Pruner, keep: int) -> Selection:
    return select_batch(pruner, [image(keep)], DeferredChecks())[0]


@dataclass(frozen=True)
class Last(Pruner):
    """The last rows; notes what it was shown."""

    name: ClassVar[str] = "last"
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    wrong: int = 0

    def select(self, tokens: VisualTokens) -> Selection:
        shown.append(tokens)
        return Selection(torch.arange(tokens.n - tokens.keep, tokens.n) + self.wrong, tokens.n)


shown: list = []


@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        (1, [10]),
        (2, [3, 10]),
        (5, [2, 3, 8, 9, 10]),  # of 4 and 6 rows: 2 and 3
        (9, [0, 1, 2, 3, 5, 6, 8, 9, 10]),
        (10, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]),  # all but the newlines
        (11, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (12, list(range(12))),
    ],
)
def test_shares_are_in_proportion_and_newlines_stay_last(keep, rows):
    found = selected(Last(), keep)
    assert found.indices.tolist() == rows
    assert (found.n, found.scores, found.merge) == (N, None, None)


def test_a_pruner_is_shown_a_raster_as_an_image_of_its_own():
    shown.clear()
    selected(Last(), 5)
    whole, lines = shown
    assert [(t.n, t.keep, t.grid, t.rasters, t.key) for t in shown] == [(4, 2, (2, 2), (), 5), (6, 3, (2, 3), (), 5)]
    for tokens, rows in ((whole, [0, 1, 2, 3]), (lines, [4, 5, 6, 8, 9, 10])):
        for values in (tokens.features, tokens.patches, tokens.vision[-2].keys, tokens.vision[-2].received.T):
            assert values[:, 0].tolist() == rows


def test_pooling_never_mixes_rasters_or_newlines():
    found = selected(get_pruner("pool"), 2)
    rows = torch.zeros(2).index_add(0, found.merge.destination, found.merge.source * found.merge.weight)
    # Means over rows 0 to 3, and over 4, 5, 6, 8, 9 and 10.
    assert rows.tolist() == pytest.approx([1.5, 7.0])
    assert len(found.indices) == 2


def test_a_wrong_answer_for_a_raster_names_pruner_and_image():
    with pytest.raises(
        PrunerError, match=r"pruner 'last' on image 0 of sample 0: indices reach 3\.\.4, allowed 0\.\.3"
    ):
        selected(Last(wrong=1), 5)


def test_rasters_that_lie_between_one_another_keep_the_order_of_rows():
    rows = torch.arange(8.0)[:, None]
    tokens = VisualTokens(rows, 4, rasters=(Raster(0, 4, 1, 2), Raster(1, 4, 1, 2)))  # even rows, odd rows
    found = select_batch(get_pruner("pool"), [tokens], DeferredChecks())[0]
    assert found.indices.tolist() == [2, 3, 6, 7]
    sums = torch.zeros(4).index_add(0, found.merge.destination, found.merge.source * found.merge.weight)
    assert sums.tolist() == [1.0, 2.0, 5.0, 6.0]


@dataclass(frozen=True)
class First(LLMPruner):
    """The first rows that are left, the next one merged in; checks what it was shown."""

    name: ClassVar[str] = "first"
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    layer: int = 2

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        first = (0, 1, 2, 3) if tokens.input.grid == (2, 2) else (4, 5, 6, 8, 9, 10)
        own = [first[row] for row in tokens.rows.tolist()]  # of all rows of the image
        assert tokens.hidden[:, 0].tolist() == tokens.last[0].tolist() == tokens.question[0, 0].tolist() == own
        assert tokens.input.features[tokens.rows, 0].tolist() == own
        ones = torch.arange(2)
        merge = Merge(ones, torch.zeros(2, dtype=torch.long), torch.full((2,), 0.5))
        return Selection(torch.arange(tokens.keep), tokens.n, merge=merge)


def test_inside_the_language_model_rasters_share_what_is_left():
    left = torch.tensor([0, 1, 3, 5, 6, 7, 8, 9])  # 3 of the whole view, 4 of the lines, a newline
    states = left.float()[:, None].expand(-1, 2)
    tokens = LLMTokens(2, 4, left, image(6), hidden=states, last=states.T, question=states.T[:, None])
    found = select_at_layer(First(), 2, tokens, "here")
    assert left[found.indices].tolist() == [0, 1, 5, 6]  # of 3 and 4: 2 and 2
    assert left[found.merge.source].tolist() == [0, 1, 5, 6]
    assert found.merge.destination.tolist() == [0, 0, 2, 2]
    assert found.n == len(left)


def test_frames_of_a_video_are_rasters():
    """Two steps a video: an even lattice of each, where the whole would have had none of it."""
    model, batch = build("qwen2_5_vl"), make(TINY["qwen2_5_vl"], ["v"], [7])
    (item,) = gripvlm.encode(model, batch.inputs).samples[0]
    steps, h, w = batch.inputs["video_grid_thw"][0].tolist()
    assert steps > 1
    assert item.rasters == tuple(Raster(i * h * w // 4, h // 2, w // 2, w // 2) for i in range(steps))
    _, record = gripvlm.prune_inputs(model, batch.inputs, "grid", keep=steps, return_record=True)
    assert (record.selections[0][0].indices // (h * w // 4)).tolist() == list(range(steps))


@pytest.mark.skipif("hunyuan_vl" not in TINY, reason="this transformers has no hunyuan_vl that works")
def test_marks_and_newlines_of_hunyuan_are_in_no_raster():
    items = gripvlm.encode(build("hunyuan_vl"), make(TINY["hunyuan_vl"], [2], [7]).inputs).samples[0]
    for item in items:
        (raster,) = item.rasters
        free = sorted({*range(item.features.shape[0])} - {*raster.rows().tolist()})
        assert (free[0], free[-1], len(free)) == (0, item.features.shape[0] - 1, raster.height + 2)
        newlines = item.features[free[1:-1]]
        assert torch.equal(newlines, newlines[:1].expand_as(newlines))
        assert not any(torch.equal(item.features[row], newlines[0]) for row in raster.rows().tolist())
