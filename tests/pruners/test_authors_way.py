"""Our pruners beside the same methods as their authors wrote them, on a tiny model: what both keep, and the file."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from gripvlm.api import encode, prune_inputs, pruned_run
from gripvlm.bench.shapes import architecture, random_model
from gripvlm.bench.shapes import random_prompts
from gripvlm.pruners import get_pruner
from gripvlm.pruners.ops.clusters import density_peaks
from gripvlm.types import LLMTokens, VisualTokens
from places import ROOT

sys.path.insert(0, str(ROOT / "runs"))
import authors_methods as authors
import authors_way
import methods_table


@pytest.fixture(scope="module")
def tiny():
    """The tiny model, and one prompt of 16 visual and 9 other tokens."""
    model = random_model("tiny", torch.device("cpu"), torch.float32, "sdpa")
    return model, random_prompts(model, architecture("tiny"), 1, 9, 0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("authors") / "way.json"
    authors_way.main(["--tiny", "--repeats", "2", "--batches", "1,3", "--device", "cpu", "--out", str(out)])
    return json.loads(out.read_text())


def test_both_ways_keep_the_same_tokens(measured):
    assert {row["method"] for row in measured["rows"]} == {*authors_way.METHODS}
    assert {row["batch"] for row in measured["rows"] if row["method"] in ("divprune", "cdpruner")} == {1, 3}
    for row in measured["rows"]:
        assert row["same_tokens"]["same"] == row["same_tokens"]["kept"], row
        assert row["same_tokens"]["kept"] >= row["batch"] * min(row["keep"], 6)


def test_the_file_says_what_was_measured_and_where(measured):
    assert measured["schema"] == "gripvlm.authors_way/1"
    assert {"command", "environment", "model", "shape", "repeats", "seed", "ratio"} <= measured.keys()
    for row in measured["rows"]:
        inside, short = "prefill" in row["work"], row["work"] == "choice"
        for name in ("ours_seconds", "authors_seconds", "ratio"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert (row["ours_of_unpruned"] is None) == short
        assert (row["authors_of_limit"] is None) != inside
        assert row["turns"] == (10 if short else 2)
    assert sum("to the last cut" in row["work"] for row in measured["rows"]) == 3


def test_a_cut_is_reached_before_the_end(tiny):
    model, inputs = tiny
    case = authors_way.Inside(model, inputs).fastv("fastv:layer=1", 10)
    with torch.no_grad():
        for way in case.ways.values():
            seconds, _ = authors_way.timed(way, torch.device("cpu"))
            assert 0 < seconds[authors_way.CUT] < seconds[authors_way.WHOLE]


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_prefills_end_in_the_same_logits(tiny, name):
    """Of the two whole ways, recycling and all; and the model attends as before."""
    model, inputs = tiny
    inside = authors_way.Inside(model, inputs)
    case = inside.fastv("fastv:layer=1", 10) if name == "fastv" else inside.sparsevlm(10, True)
    spec = "fastv:layer=1" if name == "fastv" else name
    with pruned_run(model, inputs, spec, 10, encoded=inside.encoded) as (arguments, _):
        ours = model(**arguments).logits[:, -1]
    seen = []
    original = authors.prefill
    try:
        authors.prefill = lambda *args: seen.append(original(*args)) or seen[-1]
        rows = case.ways["authors"](lambda part: None)
    finally:
        authors.prefill = original
    assert len(rows) == len(seen[0].rows)
    torch.testing.assert_close(seen[0].logits, ours, atol=2e-5, rtol=0)
    assert model.get_decoder().config._attn_implementation == "sdpa"


@torch.no_grad()
def test_visionzip_projects_the_rows_that_it_keeps(tiny):
    """Dominant rows are the encoder's; where nothing is contextual, all are."""
    model, inputs = tiny
    (item,) = encode(model, inputs).samples[0]
    kept, rows = authors.visionzip(model, inputs["pixel_values"], 6, 0)
    torch.testing.assert_close(rows[0], item.features[kept[0]], atol=2e-5, rtol=1e-4)
    _, record = prune_inputs(model, inputs, "visionzip:contextual=0", 6, return_record=True)
    assert record.selections[0][0].indices.tolist() == kept[0].tolist()
    both, merged = authors.visionzip(model, inputs["pixel_values"], 4, 2)
    same = torch.isclose(merged[0], item.features[both[0]], atol=2e-5, rtol=1e-4).all(dim=1)
    assert same.sum() == 4  # the contextual two have absorbed others
    assert model.get_encoder("image").config._attn_implementation == "sdpa"


def test_recycling_clusters_alike():
    rows = torch.randn(60, 16, generator=torch.Generator().manual_seed(3))
    centres, means = authors.recycled(rows, 6)
    ours, nearest = density_peaks(rows, 6)
    assert sorted(centres.tolist()) == sorted(ours.tolist())
    for centre, mean in zip(centres, means, strict=True):
        mine = rows[nearest == ours.tolist().index(int(centre))]
        torch.testing.assert_close(mean, mine.mean(dim=0))


def test_sparsevlm_chooses_alike_among_many():
    """With hundreds of tokens several clusters are recycled, which the tiny model has too few for."""
    random = torch.Generator().manual_seed(4)
    n, t, width, keep = 200, 8, 32, 90
    features, question = torch.randn(n, width, generator=random), torch.randn(t, width, generator=random)
    hidden = torch.randn(n + t + 1, width, generator=random)
    attention = torch.randn(4, n + t + 1, n + t + 1, generator=random).softmax(-1)
    pruner, places, left = get_pruner("sparsevlm"), torch.arange(1, n + 1), []
    parts = pruner.parts(n, keep)
    assert parts[2] > 2
    pick, states = authors.sparsevlm(features, question, parts, left, False)(attention, hidden, places)
    seen = LLMTokens(
        2,
        keep,
        torch.arange(n),
        VisualTokens(features, n),
        hidden=hidden[places],
        last=attention[:, -1, places],
        question=attention[:, n + 1 :, 1 : n + 1],
        text=hidden[n + 1 :],
        after=torch.ones(t, dtype=torch.bool),
        words=question,
    )
    ours = pruner.select_at_layer(2, seen)
    assert ours.indices.tolist() == pick.tolist() == left[0].tolist()
    assert (states != hidden[places[pick]]).any(dim=1).sum() > 0


def test_other_tokens_are_an_error():
    rows = torch.arange(100)
    assert authors_way.in_common([rows], [rows + 5]) == {"kept": 100, "same": 95}
    with pytest.raises(ValueError, match="94 in common"):
        authors_way.in_common([rows], [rows + 6])
    with pytest.raises(ValueError, match="in common"):
        authors_way.in_common([rows], [rows[:99]])


def test_the_page_shows_the_ratios(measured, monkeypatch):
    monkeypatch.setattr(methods_table, "result", lambda name: measured if name == "authors-way" else None)
    page = methods_table.page()
    assert "## Beside the authors' way" in page
    assert measured["command"] in page
    for row in measured["rows"]:
        line = f"| `{row['method']}` | {row['work']} | {row['batch']} | {methods_table.times_of(row['ratio'])} |"
        assert line in page
    monkeypatch.setattr(methods_table, "result", lambda name: None)
    assert "authors' way" not in methods_table.page()


def test_methods_can_be_chosen(tmp_path):
    out = tmp_path / "way.json"
    authors_way.main(
        ["--tiny", "--repeats", "2", "--methods", "divprune", "fastv", "--device", "cpu", "--out", str(out)]
    )
    assert {row["method"] for row in json.loads(out.read_text())["rows"]} == {"divprune", "fastv"}


def test_quartiles_need_two_turns(tmp_path):
    with pytest.raises(SystemExit, match="2 or more"):
        authors_way.main(["--tiny", "--repeats", "1", "--out", str(tmp_path / "way.json")])
    assert not (tmp_path / "way.json").exists()
