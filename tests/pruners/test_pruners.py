"""Every pruner on bare tensors: what all must do, then what each one computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gripvlm
from gripvlm.engine.outputs import checked_selection
from gripvlm.errors import BudgetError, PrunerError
from gripvlm.pruners import ScorePruner, get_pruner, list_pruners, pruner_names, register_pruner, top_k
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.baselines.grid import Grid, lattice
from gripvlm.pruners.baselines.norm import Norm
from gripvlm.pruners.baselines.pool import Pool
from gripvlm.pruners.baselines.random import Random
from gripvlm.pruners.input.divprune import DivPrune
from gripvlm.pruners.registry import _sources
from gripvlm.types import VisionRows, VisualTokens

NOT_ALONE = {
    "given",
    "keep_all",
    "full",
    "grip",
    "ensemble",
    "mmr",
    "split",
    "spread",
}  # need scores, all rows, a pruner
WRAPPED = ["ensemble(norm,divprune)", "mmr(norm)", "split(norm)", "spread(divprune)"]
CHOOSING = sorted({row.name for row in list_pruners() if row.stage == "input"} - NOT_ALONE) + WRAPPED


def tokens(h: int, w: int, keep: int, seed: int = 0, **fields) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(h * w, 8, generator=generator)
    question = torch.randn(3, 8, generator=generator)
    vision = {
        layer: VisionRows(*torch.rand(2, 2, h * w, generator=generator), torch.randn(h * w, 4, generator=generator))
        for layer in (0, 5, 8, -2, -1)
    }
    patches = torch.randn(h * w, 6, generator=generator)
    return VisualTokens(
        features, keep, grid=(h, w), **{"question": question, "vision": vision, "patches": patches} | fields
    )


# --- what all must do ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSING)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
def test_exactly_k_ascending_unique_and_repeatable(name, data, h, w, seed):
    k = data.draw(st.integers(1, h * w))
    given_tokens = tokens(h, w, k, seed)
    first, again = (get_pruner(name).select(given_tokens) for _ in range(2))
    assert first.n == h * w
    assert first.k == k == int(first.mask().sum())
    assert first.indices.dtype == torch.long
    assert bool((first.indices.diff() > 0).all())
    assert int(first.indices[0]) >= 0
    assert int(first.indices[-1]) < h * w
    assert torch.equal(first.indices, again.indices)
    checked_selection(name, first, h * w, k, torch.device("cpu"), "here")
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
    full = tokens(6, 6, 7)
    assert full.question is not None
    half = replace(full, features=full.features.bfloat16(), question=full.question.bfloat16())
    assert get_pruner(name).select(half).k == 7


@pytest.mark.parametrize(
    "name", [row.name for row in list_pruners() if "vision_attention" in row.needs and row.stage == "input"]
)
def test_towers_without_cls_and_keys_are_fine(name):
    full = tokens(6, 6, 7)
    bare = replace(full, vision={layer: VisionRows(rows.received) for layer, rows in full.vision.items()})
    assert checked_selection(name, get_pruner(name).select(bare), 36, 7, torch.device("cpu"), "here").k == 7


def test_top_k_is_stable():
    assert top_k(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]
    assert top_k(torch.zeros(6), 3).tolist() == [0, 1, 2]
    assert top_k(torch.tensor([-torch.inf, 2.0, torch.inf]), 2).tolist() == [1, 2]


# --- what each one computes ---------------------------------------------------------------------


def test_keep_all():
    for name in ("keep_all", "full"):
        chooser = get_pruner(name)
        assert chooser.name == name
        assert chooser.default_keep == 1.0
        assert chooser.select(tokens(3, 4, 12)).indices.tolist() == list(range(12))
        with pytest.raises(BudgetError, match=rf"'{name}' keeps every .* 5 of 12 cannot be met: leave keep out"):
            chooser.select(tokens(3, 4, 5))


def test_norm_keeps_the_longest_rows():
    features = torch.zeros(5, 3)
    features[:, 0] = torch.tensor([1.0, -9.0, 2.0, 9.0, -3.0])
    selection = Norm().select(VisualTokens(features, 3))
    assert selection.indices.tolist() == [1, 3, 4]
    assert selection.scores is not None
    assert selection.scores.tolist() == [1, 9, 2, 9, 3]


def test_random_is_uniform_nested_and_tied_to_seed_and_image():
    picks = [Random(seed).select(tokens(3, 4, 3)).indices for seed in range(2000)]
    counts = torch.bincount(torch.cat(picks), minlength=12)
    assert int(counts.min()) > 400  # 500 expected, standard deviation 19
    assert int(counts.max()) < 600
    few, many = (set(Random(5).select(tokens(3, 4, k)).indices.tolist()) for k in (4, 9))
    assert few < many
    base = Random(5).select(tokens(6, 6, 9, key=1)).indices
    assert torch.equal(base, Random(5).select(tokens(6, 6, 9, seed=1, key=1, sample=3)).indices)
    for other in (Random(6).select(tokens(6, 6, 9, key=1)), Random(5).select(tokens(6, 6, 9, key=2))):
        assert not torch.equal(base, other.indices)
    assert not torch.equal(base, Random(5).select(tokens(6, 6, 9, key=1, image=1)).indices)


def test_grid_is_even():
    assert Grid().select(tokens(4, 4, 4)).indices.tolist() == [5, 7, 13, 15]
    assert Grid().select(tokens(3, 9, 3)).indices.tolist() == [10, 13, 16]
    assert Grid().select(tokens(5, 5, 1)).indices.tolist() == [12]
    assert Grid().select(tokens(1, 7, 7)).indices.tolist() == list(range(7))


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_lattice_covers_the_image(h, w, data):
    """No row or column of the raster is far from the chosen ones."""
    k = data.draw(st.integers(1, h * w))
    indices, centres = lattice((h, w), k)
    assert indices.unique().numel() == k
    assert bool((indices.diff() > 0).all()) if k > 1 else True
    assert bool((centres.floor()[:, 0] * w + centres.floor()[:, 1] == indices).all())
    rows = (indices // w).unique()
    per_row = torch.bincount(indices // w)[rows]
    assert int(per_row.max() - per_row.min()) <= 1
    gaps = torch.cat((rows[:1] + 1, rows.diff(), h - rows[-1:]))
    assert int(gaps.max()) <= -(-h // rows.numel()) + 1


def pooled(grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """Features [n, d] and what Pool makes of them [k, d], by the definition of a merge."""
    given_tokens = tokens(*grid, k)
    selection = Pool().select(given_tokens)
    merge = selection.merge
    assert merge is not None
    rows = torch.zeros(k, 8)
    rows.index_add_(0, merge.destination, given_tokens.features[merge.source] * merge.weight[:, None])
    return given_tokens.features, rows


@pytest.mark.parametrize(("h", "w", "r", "c"), [(4, 4, 2, 2), (6, 6, 2, 2), (6, 6, 3, 3), (6, 9, 2, 3), (24, 24, 8, 8)])
def test_pool_is_block_average_pooling_where_blocks_are_equal(h, w, r, c):
    features, rows = pooled((h, w), r * c)
    blocks = torch.nn.functional.avg_pool2d(features.T.reshape(1, 8, h, w), (h // r, w // c))
    torch.testing.assert_close(rows, blocks.flatten(2)[0].T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pool_shares_every_token_out_once(h, w, data):
    k = data.draw(st.integers(1, h * w))
    given_tokens = tokens(h, w, k)
    merge = Pool().select(given_tokens).merge
    assert merge is not None
    assert sorted(merge.source.tolist()) == list(range(h * w))
    sizes = torch.bincount(merge.destination, minlength=k)
    assert int(sizes.min()) >= 1
    torch.testing.assert_close(merge.weight, 1 / sizes[merge.destination])


def test_pool_leaves_no_anchor_empty():
    """On a crowded lattice some anchor's own cell lies nearer to another's point."""
    merge = Pool().select(tokens(12, 12, 130)).merge
    assert merge is not None
    assert int(torch.bincount(merge.destination, minlength=130).min()) == 1


def slow_divprune(features: Tensor, k: int) -> list[int]:
    """The paper's greedy rule, word for word, one pair at a time."""
    n = features.shape[0]
    unit = [row / row.norm() for row in features]
    distance = [[1 - float(a @ b) for b in unit] for a in unit]
    start = max(range(n), key=lambda i: min((distance[i][j] for j in range(n) if j != i), default=0.0))
    chosen = [start]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    return sorted(chosen)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 14), st.integers(0, 99), st.data())
def test_divprune_follows_the_greedy_rule(n, seed, data):
    k = data.draw(st.integers(1, n))
    features = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    assert DivPrune().select(VisualTokens(features, k)).indices.tolist() == slow_divprune(features, k)


def test_divprune_takes_one_of_each_cluster_and_survives_duplicates():
    corners = torch.eye(4).repeat_interleave(3, dim=0)  # 4 directions, 3 equal rows each
    assert DivPrune().select(VisualTokens(corners, 4)).indices.tolist() == [0, 3, 6, 9]
    assert DivPrune().select(VisualTokens(corners, 11)).k == 11
    assert DivPrune().select(VisualTokens(torch.zeros(6, 4), 3)).indices.tolist() == [0, 1, 2]


def test_given_ranks_by_the_callers_scores():
    scores = [[torch.tensor([0.0, 5.0, 1.0, 4.0])], [torch.arange(4.0), -torch.arange(4.0)]]
    pruner = Given(scores)

    def picked(sample: int, image: int) -> list[int]:
        return pruner.select(VisualTokens(torch.zeros(4, 2), 2, sample=sample, image=image)).indices.tolist()

    assert (picked(0, 0), picked(1, 0), picked(1, 1)) == ([1, 3], [2, 3], [0, 1])
    with pytest.raises(PrunerError, match="no scores for image 1 of sample 0"):
        picked(0, 1)
    with pytest.raises(PrunerError, match=r"tensor \(9,\), got \(4,\)"):
        pruner.select(tokens(3, 3, 2))


# --- the registry -------------------------------------------------------------------------------


def test_names_and_specs():
    assert get_pruner("divprune") == DivPrune()
    assert get_pruner("random", seed=3) == get_pruner("random:seed=3") == Random(3)
    assert get_pruner(" random : seed = 4 ") == Random(4)
    assert get_pruner("random:seed=3", seed=9) == Random(9)
    made = Random(1)
    assert get_pruner(made) is made


def test_the_list_says_what_each_needs():
    rows = {row.name: row for row in list_pruners()}
    assert {*CHOOSING, *NOT_ALONE} - set(WRAPPED) <= set(rows)
    assert sorted(rows) == pruner_names()
    assert rows["grid"].needs == ("grid",)
    assert rows["divprune"].needs == ("features",)
    assert rows["divprune"].stage == "input"
    assert "2503.02175" in rows["divprune"].source


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: get_pruner("divprun"), r"unknown pruner 'divprun': did you mean 'divprune' or "),
        (lambda: get_pruner("zzz"), "unknown pruner 'zzz': known are "),
        (
            lambda: get_pruner("random:sead=3"),
            r"'random' has no option 'sead': did you mean 'seed'\? its options are seed=0",
        ),
        (lambda: get_pruner("grid:seed=3"), "'grid' has no option 'seed': it has none: type 'grid' alone"),
        (lambda: get_pruner("random:seed=abc"), "takes seed as a whole number, got 'abc': type random:seed=0"),
        (lambda: get_pruner("random:seed=1.5"), "takes seed as a whole number, got 1.5"),
        (lambda: get_pruner("random", seed="3"), "takes seed as a whole number, got '3'"),
        (lambda: get_pruner("random:seed=True"), "takes seed as a whole number, got True"),
        (lambda: get_pruner("random:3"), "type name:option=value"),
        (
            lambda: get_pruner("given"),
            r"'given' needs scores .*Tensor.*from Python, get_pruner\('given', scores=\.\.\.\)",
        ),
        (lambda: get_pruner("given:scores=3"), "'given' needs scores .* for use from Python"),
        (lambda: get_pruner("given", scores=[[3.0]]).select(tokens(1, 1, 1)), "needs a tensor .* got a float"),
        (lambda: get_pruner(DivPrune), r"the class DivPrune: pass an object, DivPrune\(\)"),
        (lambda: get_pruner(64), "got a int, which has no select"),
        (lambda: get_pruner(Random(), seed=1), "go with a name"),
        (lambda: register_pruner("divprune", Norm), "'divprune' is taken"),
        (lambda: register_pruner("my-pruner", Norm), "must be snake_case"),
    ],
)
def test_what_the_registry_refuses(call, says):
    with pytest.raises(PrunerError, match=says):
        call()


@dataclass(frozen=True)
class Last(ScorePruner):
    """A third party's pruner: prefers the last tokens."""

    name: ClassVar[str] = "last"

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.arange(tokens.n).float()


@dataclass(frozen=True)
class Tuned(Last):
    """Options of every kind that a spec can hold, and one that it cannot."""

    name: ClassVar[str] = "tuned"

    share: float
    mode: Literal["soft", "hard"] = "soft"
    path: str | None = None
    flag: bool = False
    rows: Sequence[int] = ()


def plain(share: "Missing", **anything):  # noqa: F821, UP037
    """A factory whose annotation cannot be read."""
    return share, anything


@pytest.fixture
def others(monkeypatch):
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {"tuned": Tuned, "plain": plain})


def test_options_are_read_as_their_annotations_say(others):
    assert get_pruner("tuned:share=1") == Tuned(1)
    made = get_pruner("tuned:share=0.5,mode=hard,path=7,flag=True")
    assert made == Tuned(0.5, "hard", "7", True)
    assert get_pruner("tuned", share=1, rows=[1, 2]).rows == [1, 2]
    assert get_pruner("plain:share=x,more=2") == ("x", {"more": 2})
    row = next(row for row in list_pruners() if row.name == "tuned")
    assert [str(option) for option in row.options][:2] == ["share (a number)", "mode=soft"]
    assert [option.name for option in row.options if not option.typeable] == ["rows"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("tuned", r"'tuned' needs share \(a number\): type tuned:share=\.\.\."),
        ("tuned:share=much", "takes share as a number, got 'much'$"),
        ("tuned:share=1,mode=odd", "takes mode as 'soft' or 'hard', got 'odd': type tuned:mode=soft"),
        ("tuned:share=1,flag=1", "takes flag as True or False, got 1"),
        ("tuned:share=1,rows=3", "rows=.*cannot be typed in a name: it is for use from Python"),
    ],
)
def test_values_that_do_not_fit_are_refused(others, spec, says):
    with pytest.raises(PrunerError, match=says):
        get_pruner(spec)


def test_a_registered_pruner_is_like_any_other(monkeypatch):
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})
    gripvlm.register_pruner("last", Last)
    gripvlm.register_pruner("last_by_path", f"{__name__}:Last")
    assert "last" in pruner_names()
    assert get_pruner("last").select(tokens(3, 3, 2)).indices.tolist() == [7, 8]
    assert type(get_pruner("last_by_path")).__name__ == "Last"


def test_entry_points_are_found_but_cannot_shadow_built_ins(monkeypatch):
    from importlib.metadata import EntryPoint

    points = [EntryPoint(name, f"{__name__}:Last", "gripvlm.pruners") for name in ("last", "divprune")]
    monkeypatch.setattr("gripvlm.pruners.registry.entry_points", lambda group: points)
    assert type(get_pruner("last")).__name__ == "Last"
    assert get_pruner("divprune") == DivPrune()
    assert _sources()["last"] == f"{__name__}:Last"
