"""Twenty-one methods against what their authors' own code chose on the same tensors, and so do second implementations.

authors/choices.json is written by authors/record.py, which runs that code apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from authors import cases
from torch import Tensor

import second
from gripvlm.pruners import get_pruner, top_k
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.llm.sparsevlm import SparseVLM
from gripvlm.pruners.ops.schedules import average_tokens
from gripvlm.pruners.wrappers.mmr import MMR
from gripvlm.pruners.wrappers.restore import Restore
from gripvlm.types import LLMTokens, Selection, VisionRows, VisualTokens
from places import TESTS

CHOICES = json.loads((TESTS / "pruners" / "authors" / "choices.json").read_text(encoding="utf-8"))["methods"]


def runs(method: str) -> list[Any]:
    return [pytest.param(run, id=f"{run.get('seed', '')}-{run.get('keep', '')}") for run in CHOICES[method]["runs"]]


@cache
def case(method: str, seed: int) -> dict[str, Any]:
    return cases.CASES[method](seed)


def groups_of(selection: Selection) -> dict[int, list[int]]:
    """Kept row -> the rows that it is the mean of."""
    groups = {int(i): [int(i)] for i in selection.indices}
    if selection.merge is not None:
        for slot in selection.merge.destination.unique():
            mine = selection.merge.destination == slot
            members = sorted(selection.merge.source[mine].tolist())
            assert torch.allclose(selection.merge.weight[mine], torch.tensor(1 / len(members)))
            groups[int(selection.indices[slot])] = members
    return groups


def inside(layer: int, keep: int, known: VisualTokens, n: int, **seen: Any) -> LLMTokens:
    return LLMTokens(layer, keep, torch.arange(n), known, **seen)


def test_every_method_is_there_with_its_commit():
    assert set(CHOICES) == set(cases.CASES)
    assert all(len(one["commit"]) == 40 and one["runs"] and "/" in one["repository"] for one in CHOICES.values())


@pytest.mark.parametrize("run", runs("hiprune"))
def test_hiprune(run):
    seen = case("hiprune", run["seed"])
    received = {name: seen[name].mean(dim=1)[:, 1:] for name in ("middle", "deep")}
    tokens = VisualTokens(
        torch.zeros(cases.N, 1),
        run["keep"],
        (cases.SIDE, cases.SIDE),
        vision={8: VisionRows(received["middle"]), -2: VisionRows(received["deep"])},
    )
    assert get_pruner("hiprune").select(tokens).indices.tolist() == run["kept"]
    middle, deep = (received[name].double().mean(dim=0).tolist() for name in ("middle", "deep"))
    assert second.hiprune(middle, deep, cases.SIDE, run["keep"], seen["alpha"]) == run["kept"]


@pytest.mark.parametrize("run", runs("vispruner"))
def test_vispruner(run):
    seen = case("vispruner", run["seed"])
    rows, cls = seen["rows"], seen["cls"]
    tokens = VisualTokens(torch.zeros(100, 1), run["keep"], vision={-2: VisionRows(cls, cls)}, patches=rows)
    assert get_pruner("vispruner").select(tokens).indices.tolist() == run["kept"]
    assert second.vispruner(cls.double().mean(dim=0).tolist(), rows, run["keep"], 0.5, 8) == run["kept"]


@pytest.mark.parametrize("run", runs("vscan_vision"))
def test_vscan(run):
    seen = case("vscan_vision", run["seed"])
    vision = {layer: VisionRows(seen[name], seen[name]) for layer, name in ((5, "shallow"), (-2, "deep"))}
    tokens = VisualTokens(seen["rows"], run["keep"], (cases.SIDE, cases.SIDE), vision=vision)
    groups = {i: [i] for i in run["kept"]}
    dropped = [i for i in range(cases.N) if i not in groups]
    for i, kept in zip(dropped, run["into"], strict=True):
        groups[kept].append(i)
    groups = {kept: sorted(those) for kept, those in groups.items()}
    assert groups_of(get_pruner("vscan_vision").select(tokens)) == groups
    near, far = (seen[name].double().mean(dim=0).tolist() for name in ("shallow", "deep"))
    if run["keep"] == 64:  # one pair at a time takes long
        found = second.vscan(near, far, seen["rows"], (cases.SIDE, cases.SIDE), run["keep"], 0.5, 6)
        assert {kept: sorted(those) for kept, those in found.items()} == groups


@pytest.mark.parametrize("run", runs("pumer"))
def test_pumer(run):
    seen = case("pumer", run["seed"])
    text, n = seen["text"], seen["n"]
    looks, keys = seen["attention"][:, :text, text:], seen["keys"][text:]
    pruner = get_pruner("pumer", prune=float(run["pruned"]), merge=float(run["merged"]))
    keep = n - run["pruned"] - run["merged"]
    known = VisualTokens(torch.zeros(n, 1), keep)
    shown = inside(3, keep, known, n, question=looks, last=looks[:, -1], keys=keys, after=torch.ones(text).bool())
    found = pruner.select_at_layer(3, shown)
    assert sorted(groups_of(found).values()) == run["groups"]
    score = looks.double().mean(dim=(0, 1)).tolist()
    again = second.pumer(score, keys, run["pruned"], run["merged"])
    assert sorted(map(sorted, again.values())) == run["groups"]
    assert run["merged"] <= (n - run["pruned"] - 1) // 2


@pytest.mark.parametrize("run", runs("dart"))
def test_dart(run):
    """The text ahead of the image has the largest keys of all, and is no pivot."""
    seen = case("dart", run["seed"])
    ahead, n = seen["ahead"], seen["n"]
    said = [*range(ahead), *range(ahead + n, len(seen["hidden"]))]
    sizes = seen["keys"].abs().sum(dim=(0, 2))
    sizes[:ahead] = 1e6
    norm = lambda states: cases.rms_norm(states, seen["scale"])  # noqa: E731
    shown = inside(
        2,
        run["keep"],
        VisualTokens(torch.zeros(n, 1), run["keep"]),
        n,
        hidden=seen["hidden"][ahead : ahead + n],
        text=seen["hidden"][said],
        after=torch.tensor([place >= ahead for place in said]),
        key_sizes=sizes[ahead : ahead + n],
        text_key_sizes=sizes[said],
        norm=norm,
    )
    found = get_pruner("dart").select_at_layer(2, shown)
    assert found.indices.tolist() == run["kept"]
    states = norm(seen["hidden"])
    text = slice(ahead + n, None)
    again = second.dart(
        states[ahead : ahead + n], sizes[ahead : ahead + n].tolist(), states[text], sizes[text].tolist(), run["keep"]
    )
    assert again == run["kept"]


@pytest.mark.parametrize("run", runs("mustdrop_llm"))
def test_mustdrop(run):
    """Cut by cut, and at the layers of the code."""
    seen = case("mustdrop_llm", run["seed"])
    start, n, text, always = seen["ahead"], seen["n"], seen["text"], seen["always"]
    cls = torch.zeros(1, n)
    cls[0, always] = 1.0
    pruner = get_pruner("mustdrop_llm", ratio=seen["g"] / seen["i"], keys=len(always) / n)
    assert {cut["before_layer"] for cut in run["cuts"]} <= {*pruner.layers} == {3, 7, 11, 15}
    left = list(range(n))
    for cut in pruner.layers:
        length = start + len(left) + text
        looks = cases.looks(run["seed"], cut - 1, length)[:, :, start : start + len(left)]
        after = looks[:, -text:].mean(dim=0)
        passed = second.mustdrop(after, [i for i, row in enumerate(left) if row in always], seen["g"], seen["i"])
        kept = [left[i] for i in passed]
        theirs = next((one["kept"] for one in run["cuts"] if one["before_layer"] == cut), left)
        assert kept == theirs
        shown = LLMTokens(
            cut,
            len(theirs),
            torch.tensor(left),
            VisualTokens(torch.zeros(n, 1), n, vision={-1: VisionRows(cls, cls)}),
            question=torch.cat((looks[:, :start], looks[:, -text:]), dim=1),
            last=looks[:, -1],
            after=torch.tensor([False] * start + [True] * text),
        )
        assert [left[i] for i in pruner.select_at_layer(cut, shown).indices] == theirs
        left = theirs


@pytest.mark.parametrize("run", [one for one in runs("sparsevlm") if "cuts" in one.values[0]])
def test_sparsevlm(run):
    """Raters once, of the words after the image; then what is kept and what is recycled at each cut."""
    seen = case("sparsevlm", run["seed"])
    start, n, text = seen["ahead"], seen["n"], seen["text"]
    prompt = seen["prompt"]
    image, words = prompt[start : start + n], torch.cat((prompt[:start], prompt[start + n :]))
    assert second.raters(image, words[start:]) == run["raters"]
    pruner = SparseVLM()
    assert [cut["before_layer"] for cut in run["cuts"]] == list(pruner.layers)
    hidden = image
    for cut in run["cuts"]:
        m, keep = cut["n"], len(cut["kept"]) + len(cut["groups"])
        looks = cases.looks(run["seed"], cut["before_layer"] - 1, start + m + text)[:, :, start : start + m]
        question = torch.cat((looks[:, :start], looks[:, start + m :]), dim=1)
        after = torch.tensor([False] * start + [True] * text)
        known = VisualTokens(image, n)
        shown = inside(
            cut["before_layer"], keep, known, m,
            hidden=hidden, question=question, last=looks[:, -1], words=words, text=words, after=after,
        )  # fmt: skip
        kept, recycled, clusters = pruner.parts(m, keep)
        assert (kept, clusters) == (len(cut["kept"]), len(cut["groups"]))
        theirs = sorted([[i] for i in cut["kept"]] + cut["groups"])
        assert sorted(groups_of(pruner.select_at_layer(cut["before_layer"], shown)).values()) == theirs
        score = looks[:, start + m :][:, run["raters"]].double().mean(dim=(0, 1)).tolist()
        again = second.sparsevlm(score, hidden, kept, recycled, clusters)
        assert sorted(map(sorted, again.values())) == theirs
        hidden = torch.cat((hidden[cut["kept"]], *(hidden[group].mean(dim=0)[None] for group in cut["groups"])))


def test_sparsevlm_costs_what_its_docstring_says():
    """Rows that the code's layers were given, of 576; and our schedule pays for what it is asked."""
    said = " ".join((SparseVLM.__doc__ or "").split())
    averages = {run["setting"]: run["average"] for run in CHOICES["sparsevlm"]["runs"] if "average" in run}
    assert {setting: round(average + 1e-9, 1) for setting, average in averages.items()} == {
        192: 206.5,
        128: 145.4,
        64: 82.3,
    }
    assert "206.5, 145.4 and 82.3 a layer" in said
    for run in CHOICES["sparsevlm"]["runs"]:
        if "rows" not in run:
            continue
        assert [layer for layer in range(1, 32) if run["rows"][layer] != run["rows"][layer - 1]] == [3, 7, 16]
        left = 576
        for cut in (3, 7, 16):
            kept, _, clusters = SparseVLM().parts(left, run["rows"][cut])
            assert kept + clusters == run["rows"][cut]
            assert clusters > 0
            left = run["rows"][cut]


@pytest.mark.parametrize("run", runs("hired"))
def test_hired(run):
    """The thumbnail's budget and each choice are the code's; tiles' shares go by strips, ours by where tiles lie."""
    seen = case("hired", run["seed"])
    n = seen["first"].shape[-1]
    side = int(n**0.5)
    budget = int(5 * n * seen["share"])
    shares = second.hired(seen["first"][0].double().sum(dim=0).tolist(), 4, budget, seen["alpha"])
    assert [len(kept) for kept in run["kept"]] == [int(seen["alpha"] * budget), *shares]
    pruner = get_pruner("hired", layout=(2, 2))
    every = [
        VisualTokens(torch.zeros(n, 1), 1, (side, side), image=tile, vision={0: rows(first), -2: rows(last)})
        for tile, (first, last) in enumerate(zip(seen["first"], seen["last"], strict=True))
    ]
    for tokens, kept in zip(every, run["kept"], strict=True):
        assert top_k(pruner.score(tokens), len(kept)).tolist() == kept
    spread = [VisualTokens(t.features, budget // 5, t.grid, image=t.image, vision=t.vision) for t in every]
    ours = pruner.allocate_budget([*spread[1:], spread[0]], 32)
    assert ours[-1] == len(run["kept"][0])


def rows(cls: Tensor) -> VisionRows:
    return VisionRows(cls, cls)


@pytest.mark.parametrize("run", runs("otprune"))
def test_otprune(run):
    rows = case("otprune", run["seed"])["rows"]
    assert get_pruner("otprune").select(VisualTokens(rows, run["keep"])).indices.tolist() == run["kept"]
    if run["keep"] == 16:  # a determinant for each token and step
        assert second.otprune(rows, run["keep"], 0.01) == run["kept"]


@pytest.mark.parametrize("run", runs("scope"))
def test_scope(run):
    seen = case("scope", run["seed"])
    vision = {-2: rows(seen["cls"])}
    tokens = VisualTokens(torch.zeros(144, 1), run["keep"], vision=vision, patches=seen["rows"])
    assert get_pruner("scope").select(tokens).indices.tolist() == run["kept"]
    if run["keep"] == 16:
        assert second.scope(seen["cls"].double().mean(dim=0).tolist(), seen["rows"], 16, 1.0) == run["kept"]


@pytest.mark.parametrize("run", runs("mmr"))
def test_mmr_over_a_trained_selector_is_idpruner(run):
    seen = case("mmr", run["seed"])
    pruner = MMR((Given([[seen["scores"]]]),), balance=run["balance"])
    assert pruner.select(VisualTokens(seen["rows"], run["keep"])).indices.tolist() == run["kept"]
    if run["keep"] == 16:
        assert second.mmr(seen["scores"], seen["rows"], 16, run["balance"]) == run["kept"]


@pytest.mark.parametrize("run", runs("holov"))
def test_holov(run):
    seen = case("holov", run["seed"])
    tokens = VisualTokens(seen["rows"], run["keep"], vision={-2: rows(seen["cls"])})
    assert get_pruner("holov").select(tokens).indices.tolist() == run["kept"]
    if run["keep"] == 100:  # one pair at a time takes long
        looked = seen["cls"].double().mean(dim=0).tolist()
        assert second.holov(looked, seen["rows"], run["keep"], 16, 0.09) == run["kept"]


@pytest.mark.parametrize("run", runs("prunesid"))
def test_prunesid(run):
    rows = case("prunesid", run["seed"])["rows"]
    assert get_pruner("prunesid").select(VisualTokens(rows, run["keep"])).indices.tolist() == run["kept"]
    if run["keep"] == 64:  # one pair at a time takes long
        assert second.prunesid(rows, run["keep"]) == run["kept"]


@pytest.mark.parametrize("run", runs("apet_input"))
def test_apet(run):
    """Basis, kept rows and where others go; the code merges other rows at the basis' places (a numbered departure)."""
    seen = case("apet_input", run["seed"])
    tokens = VisualTokens(seen["rows"], run["keep"], patches=seen["rows"])
    groups = groups_of(get_pruner("apet_input").select(tokens))
    assert sorted(groups) == sorted(run["basis"] + run["kept"])
    to = {i: kept for kept, those in groups.items() for i in those}
    theirs = {i: kept for i, kept in zip(run["rest"], run["into"], strict=True) if i not in run["basis"]}
    assert {i: to[i] for i in theirs} == theirs
    if run["keep"] == 32:
        again = second.apet(seen["rows"], run["keep"], seen["basis"])
        assert {kept: sorted(those) for kept, those in again.items()} == groups


def stages(method: str, run: Any) -> Iterator[tuple[LLMTokens, list[int]]]:
    """What enters each cut of a run, and what the code left of it."""
    seen, seed = case(method, run["seed"]), run["seed"]
    ahead, n = seen["ahead"], seen["n"]
    length = ahead + n + seen["text"]
    image = slice(ahead, ahead + n)
    left, enters = torch.arange(n), cases.states(seed, 0, length)[image]
    for cut in run["cuts"]:
        layer, m = cut["before_layer"], len(left)
        yield (
            LLMTokens(
                layer,
                len(cut["kept"]),
                left,
                VisualTokens(enters, n, (cases.SIDE, cases.SIDE)),
                hidden=cases.states(seed, layer, length)[image][left],
                before=cases.states(seed, layer - 1, length)[image][left],
                last=cases.last_looks(seed, layer - 1, length - n + m)[:, ahead : ahead + m],
            ),
            cut["kept"],
        )
        left = torch.tensor(cut["kept"])


@pytest.mark.parametrize("method", ["clse", "v2drop"])
@pytest.mark.parametrize("number", range(4))
def test_methods_in_stages(method, number):
    run, pruner = CHOICES[method]["runs"][number], get_pruner(method)
    assert [cut["before_layer"] for cut in run["cuts"]] == list(pruner.layers)
    for tokens, kept in stages(method, run):
        found = pruner.select_at_layer(tokens.layer, tokens)
        assert tokens.rows[found.indices].tolist() == kept
        if method == "v2drop":
            moved = [float((a - b).norm()) for a, b in zip(tokens.hidden.double(), tokens.before.double(), strict=True)]
            again = second.falling(moved)[: len(kept)]
            assert sorted(tokens.rows[again].tolist()) == kept


@pytest.mark.parametrize("method", ["clse", "v2drop"])
def test_methods_in_stages_keep_as_many_as_the_code_does(method):
    """Where its own setting is asked for; and what that pays for is what the docstring says."""
    settings = {"clse": {64: 110, 128: 220, 192: 330}, "v2drop": {None: 288}}[method]
    said = " ".join((get_pruner(method).__doc__ or "").split())
    for run in CHOICES[method]["runs"]:
        theirs = {cut["before_layer"]: len(cut["kept"]) for cut in run["cuts"]}
        assert next(iter(theirs.values())) == settings[run.get("setting")]
        average = average_tokens(576, theirs, 32)
        assert f"{average + 1e-9:.1f}" in said
        ours = get_pruner(method).schedule(576, round(average), 32)
        assert all(abs(ours[layer] - count) <= 2 for layer, count in theirs.items())


@pytest.mark.parametrize("run", runs("priortr"))
def test_priortr(run):
    seen = case("priortr", run["seed"])
    ahead, n, text = seen["ahead"], seen["n"], seen["text"]
    attention = seen["attention"][:, :, ahead : ahead + n]
    shown = inside(
        3, run["keep"], VisualTokens(torch.zeros(n, 1), n), n,
        question=torch.cat((attention[:, :ahead], attention[:, ahead + n :]), dim=1), last=attention[:, -1],
        after=torch.tensor([False] * ahead + [True] * text),
    )  # fmt: skip
    last = run["query"] == "last"
    assert get_pruner("priortr", last=last).select_at_layer(3, shown).indices.tolist() == run["kept"]
    score = second.priortr(attention[:, ahead + n :], attention[:, -1] if last else None)
    assert sorted(second.falling(score)[: run["keep"]]) == run["kept"]


@pytest.mark.parametrize("run", runs("vlm_pruner"))
def test_vlm_pruner(run):
    """What is kept, and how much of each dropped row goes into which."""
    seen = case("vlm_pruner", run["seed"])
    ahead, n = seen["ahead"], seen["n"]
    shown = inside(
        2, run["keep"], VisualTokens(torch.zeros(n, 1), n, (cases.SIDE, cases.SIDE)), n,
        hidden=seen["hidden"][ahead:], all_keys=seen["keys"][:, ahead:].transpose(0, 1).flatten(1),
    )  # fmt: skip
    found = get_pruner("vlm_pruner").select_at_layer(2, shown)
    assert found.indices.tolist() == run["kept"]
    assert found.merge is not None
    parts = zip(found.merge.source.tolist(), found.merge.destination.tolist(), found.merge.weight.tolist(), strict=True)
    into: list[dict[str, float]] = [{} for _ in run["kept"]]
    for source, slot, weight in parts:
        if source != run["kept"][slot]:
            into[slot][str(source)] = weight
        else:
            assert weight == pytest.approx(0.3)
    assert [sorted(one) for one in into] == [sorted(one) for one in run["into"]]
    assert all(ours == pytest.approx(theirs, abs=2e-5) for ours, theirs in zip(into, run["into"], strict=True))
    if run["keep"] == 32:
        assert second.vlm_pruner(seen["hidden"][ahead:], shown.all_keys, (24, 24), 32, 4, 0.8, 16) == run["kept"]


@pytest.mark.parametrize("run", runs("ivc_prune"))
def test_ivc_prune(run):
    seen = case("ivc_prune", run["seed"])
    ahead, n, values = seen["ahead"], seen["n"], seen["values"].transpose(0, 1)
    image, text = slice(ahead, ahead + n), torch.cat((values[:ahead], values[ahead + n + seen["ends"] :]))
    turns = torch.stack((seen["cos"], seen["sin"]))[:, :, image]  # [2, axes, n, d_h]
    shown = inside(
        16, len(run["kept"]), VisualTokens(torch.zeros(n, 1), n), n,
        values=values[image], text_values=text, rotary=turns.permute(2, 0, 1, 3).flatten(2),
        after=torch.arange(len(text)) >= ahead,
    )  # fmt: skip
    assert get_pruner("ivc_prune").select_at_layer(16, shown).indices.tolist() == run["kept"]
    assert second.ivc_prune(text[ahead:], values[image], shown.rotary, len(run["kept"]), 0.2, 0.01) == run["kept"]


@pytest.mark.parametrize("run", runs("hawk"))
def test_hawk(run):
    seen = case("hawk", run["seed"])
    queries, keys = seen["queries"].transpose(0, 1), seen["keys"].transpose(0, 1).repeat_interleave(2, dim=1)
    tokens = VisualTokens(torch.zeros(100, 1), run["keep"], first_queries=queries, first_keys=keys)
    weights = tuple(seen["weights"].tolist())
    assert get_pruner("hawk", weights=weights).select(tokens).indices.tolist() == run["kept"]
    assert sorted(second.falling(second.hawk(queries, keys, weights))[: run["keep"]]) == run["kept"]


@pytest.mark.parametrize("run", runs("restore"))
def test_restore(run):
    """Groups, and the row at whose place each stands."""
    seen = case("restore", run["seed"])
    scores = torch.zeros(len(seen["rows"]))
    scores[seen["kept"]] = 1
    found = Restore(Given([[scores]])).select(VisualTokens(seen["rows"], seen["keep"]))
    groups = groups_of(found)
    assert sorted(sorted(those) for kept, those in groups.items() if kept not in seen["kept"]) == run["groups"]
    assert [i for i in found.indices.tolist() if i not in seen["kept"]] == run["places"]
    rest = [i for i in range(len(scores)) if i not in seen["kept"]]
    again = second.anchors(seen["rows"][rest], seen["keep"] - len(seen["kept"]))
    assert sorted([rest[i] for i in those] for those in again.values()) == run["groups"]
