"""The scorer by itself and as the pruner `grip`."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import gripvlm
from gripvlm.errors import GripError, InputError, PrunerError
from gripvlm.grip.closeness import Closeness
from gripvlm.grip.pruner import Grip
from gripvlm.grip.scorer import FORMAT, ModelFingerprint, Scorer, ScorerConfig, ScorerError, coordinates
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.pruners.wrappers.gumbel import Gumbel
from gripvlm.pruners.wrappers.split import Split
from gripvlm.pruners.wrappers.top_p import TopP
from gripvlm.types import VisualTokens
from tiny_families import build, make
from tiny_models import llava_inputs, tiny_llava

WIDTH = 48
CLOSE = Closeness(torch.zeros(2, 1, 1), torch.zeros(2, 1, 2), None)


def scorer_of(model=None, seed: int = 0, **changes) -> Scorer:
    """A small scorer whose every weight matters: the budget's too, which start at zero."""
    torch.manual_seed(seed)
    features = WIDTH if model is None else model.get_input_embeddings().weight.shape[1]
    config = ScorerConfig(features, **{"width": 32, "blocks": 2, "heads": 2, **changes})
    scorer = Scorer(config, None if model is None else ModelFingerprint.of(model))
    with torch.no_grad():
        for name, weight in scorer.named_parameters():
            if ".film." in name or name in ("score.weight", "image.weight"):
                weight.normal_(std=0.3)
    return scorer.eval()


def one(scorer: Scorer, features, grid, fraction, question):
    """[n] logits of one image, unpadded."""
    asked = None if question is None else question[None]
    return scorer(features[None], coordinates(len(features), grid)[None], torch.tensor([fraction]), question=asked)[0]


@torch.no_grad()
def test_a_padded_batch_equals_its_images_one_by_one():
    scorer = scorer_of()
    grids = [(4, 4), None, (3, 7), (1, 1)]
    sizes, lengths, fractions = [16, 9, 21, 1], [5, 0, 11, 2], [0.25, 0.5, 0.1, 1.0]
    features = [torch.randn(n, WIDTH) for n in sizes]
    words = [torch.randn(t, WIDTH) for t in lengths]
    n, t = max(sizes), max(lengths)
    wide = torch.full((4, n, WIDTH), 7.0)  # rubbish in the padding must not leak
    asked = torch.full((4, t, WIDTH), -3.0)
    places = torch.full((4, n, 2), 5.0)
    for i in range(4):
        wide[i, : sizes[i]], asked[i, : lengths[i]] = features[i], words[i]
        places[i, : sizes[i]] = coordinates(sizes[i], grids[i])
    valid = torch.arange(n) < torch.tensor(sizes)[:, None]
    real = torch.arange(t) < torch.tensor(lengths)[:, None]
    logits = scorer(wide, places, torch.tensor(fractions), valid, asked, real)
    assert logits.dtype == torch.float32
    assert (logits[~valid] == -torch.inf).all()
    for i in range(4):
        alone = one(scorer, features[i], grids[i], fractions[i], words[i])
        assert alone.shape == (sizes[i],)
        assert torch.allclose(logits[i, : sizes[i]], alone, atol=1e-5)
    assert logits[0, :16].std() > 0.01


def test_coordinates_are_centres_in_raster_order():
    assert torch.equal(coordinates(4, (2, 2)), torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]))
    assert torch.equal(coordinates(2, None), torch.tensor([[0.5, 0.25], [0.5, 0.75]]))


@torch.no_grad()
def test_everything_it_is_told_changes_its_mind():
    scorer, features, words = scorer_of(), torch.randn(12, WIDTH), torch.randn(4, WIDTH)
    base = one(scorer, features, (3, 4), 0.25, words)
    for other in (
        one(scorer, features + torch.randn(12, WIDTH), (3, 4), 0.25, words),
        one(scorer, features, (4, 3), 0.25, words),
        one(scorer, features, None, 0.25, words),
        one(scorer, features, (3, 4), 0.05, words),
        one(scorer, features, (3, 4), 0.25, torch.randn(4, WIDTH)),
        one(scorer, features, (3, 4), 0.25, words.flip(0)),
        one(scorer, features, (3, 4), 0.25, words[:0]),
    ):
        assert (base - other).abs().max() > 1e-3


@torch.no_grad()
def test_the_budget_starts_without_effect_and_can_be_left_out():
    features, words = torch.randn(12, WIDTH), torch.randn(4, WIDTH)
    torch.manual_seed(0)
    fresh = Scorer(ScorerConfig(WIDTH, 32, 2, 2))
    assert torch.equal(one(fresh, features, None, 0.5, words), one(fresh, features, None, 0.01, words))
    blind = scorer_of(budget=False)
    assert torch.equal(one(blind, features, None, 0.5, words), one(blind, features, None, 0.01, words))
    assert not any("film" in name or "budget" in name for name in blind.state_dict())


def test_the_budget_is_learnt_from_the_first_step():
    scorer = Scorer(ScorerConfig(WIDTH, 32, 2, 2))
    one(scorer, torch.randn(6, WIDTH), None, 0.5, torch.randn(3, WIDTH)).square().sum().backward()
    assert all(block.film.weight.grad.abs().sum() > 0 for block in scorer.blocks)


@torch.no_grad()
def test_without_the_question():
    scorer, features = scorer_of(question=False), torch.randn(12, WIDTH)
    plain = one(scorer, features, None, 0.5, None)
    assert torch.equal(plain, one(scorer, features, None, 0.5, torch.randn(4, WIDTH)))
    with pytest.raises(InputError, match="reads the question"):
        one(scorer_of(), features, None, 0.5, None)


# --- rounds, one budget for a prompt -------------------------------------------------------------------


def kept_by(scorer: Scorer, tokens: list, **options) -> list[list[int]]:
    """What the scorer keeps of each image."""
    return [one.indices.tolist() for one in Grip(module=scorer, **options).select_batch(tokens)]


def tokens_of(sizes: list[list[tuple[int, int]]]) -> list[VisualTokens]:
    """Images of (n, k), a list for each prompt."""
    made = torch.Generator().manual_seed(4)
    words = [torch.randn(3 + i, WIDTH, generator=made) for i in range(len(sizes))]
    return [
        VisualTokens(torch.randn(n, WIDTH, generator=made), k, question=words[i], sample=i, image=j)
        for i, prompt in enumerate(sizes)
        for j, (n, k) in enumerate(prompt)
    ]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"rounds": 3}, {"rounds": 2, "budget": False}, {"rounds": 40}])
def test_rounds_by_hand(changes):
    """One image at a time, one round after another, against the batch."""
    scorer, some = scorer_of(**changes), tokens_of([[(16, 7)], [(30, 12)], [(9, 2)]])
    highest = []
    for tokens, kept in zip(some, kept_by(scorer, some), strict=True):
        scores = one(scorer, tokens.features, None, tokens.keep / tokens.n, tokens.question)
        places = torch.stack([torch.full((tokens.n,), 0.5), torch.arange(tokens.n) + 0.5], -1)
        close = Closeness(tokens.features[None], places[None], None).rows(torch.arange(tokens.n)[None])[0]
        film = scorer._film(torch.tensor([tokens.keep / tokens.n]))
        weight = float(scorer.diversity(film))
        rounds, picks = min(scorer.config.rounds, tokens.keep), []
        for r in range(rounds):
            upto = -(-tokens.keep * (r + 1) // rounds)
            now = scores - weight * close[picks].max(0).values if picks else scores.clone()
            now[picks] = -torch.inf
            picks += now.argsort(descending=True)[: upto - len(picks)].tolist()
        assert sorted(picks) == kept
        highest.append(sorted(scores.argsort(descending=True)[: tokens.keep].tolist()))
    assert highest != kept_by(scorer, some)


@torch.no_grad()
def test_wrappers_read_the_first_round():
    """Draws and probabilities are those of its logits; what is chosen for a count that they gave is all rounds'."""
    scorer, images = scorer_of(rounds=6), tokens_of([[(30, 6), (20, 4)]])
    grip = Grip(module=scorer)
    logits = [selection.scores for selection in grip.select_batch(images)]
    highest = [sorted(own.argsort(descending=True)[:k].tolist()) for own, k in zip(logits, (6, 4), strict=True)]
    assert [drawn.indices.tolist() for drawn in Gumbel(grip, 1e-6).select_batch(images)] == highest
    assert highest != kept_by(scorer, images)
    needed = [int((own.softmax(0).sort(descending=True).values.cumsum(0) < 0.9).sum()) + 1 for own in logits]
    assert needed[0] > 6
    assert needed[1] > 4
    raised = TopP(grip, 0.9, 9.0)
    assert raised.allocate_budget(images, 1) == needed
    more = [replace(tokens, keep=k) for tokens, k in zip(images, needed, strict=True)]
    assert [kept.indices.tolist() for kept in raised.select_batch(more)] == kept_by(scorer, more)
    shares = torch.cat(logits).softmax(0)
    shared = apportion(10, [float(shares[:30].sum()), float(shares[30:].sum())], [30, 20])
    assert Split(grip, by="mass").allocate_budget(images, 1) == shared


@torch.no_grad()
def test_a_token_beside_a_kept_one_loses_on_a_grid():
    """The same features on other grids: what is beside what differs, and so does what is kept."""
    scorer, features = scorer_of(rounds=6, question=False), torch.randn(24, WIDTH)
    images = [VisualTokens(features, 6, grid=grid) for grid in ((4, 6), (6, 4), None)]
    scorer.place.weight.zero_()  # the scores themselves know no places
    assert len({tuple(kept) for kept in kept_by(scorer, images)}) > 1


def test_how_much_tokens_lose_is_learnt_for_each_budget():
    scorer, shares = scorer_of(rounds=4), torch.tensor([0.5, 0.01])
    assert Scorer(ScorerConfig(WIDTH, 32, 2, 2, rounds=4)).penalty(shares, CLOSE).weight.tolist() == (
        pytest.approx([4.0, 4.0])
    )
    scorer.diversity.penalty.weight.data.normal_()
    weights = scorer.penalty(shares, CLOSE).weight
    assert abs(float((weights[0] - weights[1]).detach())) > 1e-3
    weights.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in scorer.diversity.parameters())


@torch.no_grad()
def test_one_budget_moves_between_the_images_of_a_prompt():
    """Exact in the total; to the images whose tokens score highest; a prompt does not see another."""
    some = tokens_of([[(16, 4), (9, 3)], [(12, 5)], [(6, 2), (6, 2), (20, 2)]])
    scorer = scorer_of(joint=True)
    kept = kept_by(scorer, some)
    counts = [len(rows) for rows in kept]
    assert [sum(counts[:2]), counts[2], sum(counts[3:])] == [7, 5, 6]
    assert counts != [tokens.keep for tokens in some]
    grip = Grip(module=scorer)
    for group in (some[:2], some[2:3], some[3:]):
        scores = torch.cat([one.scores for one in grip.select_batch(group)])
        n, k = sum(tokens.n for tokens in group), sum(tokens.keep for tokens in group)
        best = set(scores.argsort(descending=True)[:k].tolist())
        starts = [sum(tokens.n for tokens in group[:i]) for i in range(len(group))]
        alone = kept_by(scorer, group)
        assert {start + i for start, rows in zip(starts, alone, strict=True) for i in rows} == best
        assert len(scores) == n
    assert kept == [rows for group in (some[:2], some[2:3], some[3:]) for rows in kept_by(scorer, group)]
    # An image of a prompt changes what is kept of another; each image has its number.
    assert kept_by(scorer, some[:2]) != kept_by(scorer, [some[0], replace(some[2], sample=0)])
    apart = kept_by(scorer_of(), some)
    assert [len(rows) for rows in apart] == [tokens.keep for tokens in some]


@torch.no_grad()
def test_a_joint_scorer_of_one_image_is_one_that_scores_images_apart():
    plain, joint = scorer_of(), scorer_of(joint=True)
    joint.load_state_dict({**joint.state_dict(), **plain.state_dict()})
    joint.image.weight.zero_()
    some = tokens_of([[(16, 5)], [(30, 12)], [(9, 9)]])
    assert kept_by(joint, some) == kept_by(plain, some)


@torch.no_grad()
def test_many_prompts_are_scored_in_parts_that_do_not_divide_a_prompt(monkeypatch):
    some, scorer = tokens_of([[(8, 2)] * 3, [(8, 1)] * 5, [(8, 3)], [(8, 3)] * 2]), scorer_of(joint=True, rounds=2)
    whole = kept_by(scorer, some)
    for name, numbers in (("MAX_BATCH", (1, 4, 6)), ("MAX_TOKENS", (1, 24, 60))):
        for most in numbers:
            with monkeypatch.context() as patch:
                patch.setattr(f"gripvlm.grip.pruner.{name}", most)
                assert kept_by(scorer, some) == whole


def test_sizes_that_cannot_be():
    for sizes in ({"width": 30, "heads": 4}, {"blocks": 0}, {"width": 0}, {"rounds": 0}):
        with pytest.raises(InputError, match="heads must divide width"):
            ScorerConfig(WIDTH, **sizes)


# --- folders ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"joint": True, "rounds": 3}])
def test_saved_and_loaded_it_is_the_same(model, tmp_path, changes):
    scorer = scorer_of(model, **changes)
    scorer.notes = {"stage": "grpo", "steps": 7}
    scorer.train()
    scorer.save_pretrained(tmp_path / "a" / "b")
    loaded = Scorer.from_pretrained(tmp_path / "a" / "b")
    assert (loaded.config, loaded.base, loaded.notes) == (scorer.config, scorer.base, scorer.notes)
    assert not loaded.training
    assert loaded.state_dict().keys() == scorer.state_dict().keys()
    assert all(torch.equal(value, scorer.state_dict()[name]) for name, value in loaded.state_dict().items())
    features, words = torch.randn(9, WIDTH), torch.randn(3, WIDTH)
    assert torch.equal(one(loaded, features, None, 0.3, words), one(scorer, features, None, 0.3, words))
    assert {file.name for file in (tmp_path / "a" / "b").iterdir()} == {
        *("config.json", "model.safetensors", "README.md")
    }
    assert "library_name: gripvlm" in (tmp_path / "a" / "b" / "README.md").read_text()


def test_the_hub_gives_back_what_was_pushed(model, tmp_path, monkeypatch):
    """Against a stand-in for the hub that keeps files in a folder: there is no network in tests."""
    import huggingface_hub

    hub, asked = tmp_path / "hub", []

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            asked.append((repo_id, private, exist_ok))
            (hub / repo_id).mkdir(parents=True)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}: {commit_message}"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    monkeypatch.setattr("gripvlm.grip.scorer.hf_hub_download", lambda name, file, revision: str(hub / name / file))
    scorer = scorer_of(model)
    said = scorer.push_to_hub("me/grip", private=True, commit_message="first")
    assert said == "https://hub/me/grip: first"
    assert asked == [("me/grip", True, True)]
    again = Grip.from_pretrained("me/grip", revision="main").module
    assert again.digest() == scorer.digest()
    assert again.base == scorer.base


def test_a_scorer_without_a_model_loads_and_may_not_prune(model, inputs, tmp_path):
    scorer_of().save_pretrained(tmp_path)
    grip = Grip.from_pretrained(tmp_path)
    assert grip.module.base is None
    with pytest.raises(PrunerError, match="never trained"):
        gripvlm.prune_inputs(model, inputs, grip, 4)


@torch.no_grad()
def test_a_scorer_of_the_first_edition_loads(model, tmp_path):
    """Its config.json knows no rounds and no joint budget."""
    scorer = scorer_of(model)
    scorer.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    for name in ("joint", "rounds"):
        del about["scorer"][name]
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    loaded = Scorer.from_pretrained(tmp_path)
    assert loaded.config == scorer.config
    assert (loaded.config.joint, loaded.config.rounds) == (False, 1)
    assert loaded.digest() == scorer.digest()


def broken(folder, what: str) -> None:
    about = json.loads((folder / "config.json").read_text())
    if what == "format":
        about["format"] = "gripvlm.grip.scorer/99"
    elif what == "width":
        about["scorer"]["width"] = 64
    elif what == "other version":
        about["scorer"]["diversity"] = True
    (folder / "config.json").write_text(
        "{no" if what == "json" else "[1]" if what == "list" else json.dumps(about), encoding="utf-8"
    )
    if what == "damaged":
        (folder / "model.safetensors").write_bytes(b"abc")
    elif what in ("config.json", "model.safetensors"):
        (folder / what).unlink()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("format", f"format 'gripvlm.grip.scorer/99', this gripvlm reads '{FORMAT}'"),
        ("list", "format None"),
        ("json", "config.json is not JSON"),
        ("width", "does not fit"),
        ("other version", "config.json has diversity, which this gripvlm does not know: another version wrote it"),
        ("damaged", "model.safetensors is damaged"),
        ("config.json", "holds no scorer: config.json missing"),
        ("model.safetensors", "holds no scorer: model.safetensors missing"),
    ],
)
def test_a_bad_folder_is_said_to_be_one(tmp_path, what, said):
    scorer_of().save_pretrained(tmp_path)
    broken(tmp_path, what)
    with pytest.raises(ScorerError) as caught:
        Scorer.from_pretrained(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nowhere", "a/b/c", "no one/no*thing"])
def test_no_such_folder(name):
    with pytest.raises(ScorerError, match="no scorer"):
        Scorer.from_pretrained(name)


# --- the base model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_model_in_another_dtype_passes(model, dtype):
    ModelFingerprint.of(model).check(copy.deepcopy(model).to(dtype))


def test_other_models_are_refused(model):
    base = ModelFingerprint.of(model)
    base.check(model)
    with pytest.raises(ScorerError, match="with other weights"):
        base.check(tiny_llava(seed=1))
    with pytest.raises(ScorerError, match="internvl"):
        base.check(build("internvl"))
    changed = copy.deepcopy(model)
    changed.resize_token_embeddings(100)
    with pytest.raises(ScorerError, match="99 x 48"):
        base.check(changed)
    with torch.no_grad():
        changed = copy.deepcopy(model)
        changed.get_input_embeddings().weight[98] *= 1.05  # the last row is one of those compared
    with pytest.raises(ScorerError, match="with other weights"):
        base.check(changed)


def test_another_width_is_refused(model):
    wide = copy.deepcopy(model)
    wide.set_input_embeddings(torch.nn.Embedding(99, 64))
    with pytest.raises(ScorerError, match="99 x 64"):
        ModelFingerprint.of(model).check(wide)


# --- as a pruner --------------------------------------------------------------------------------------------------


class Spy(Scorer):
    """Notes the logits it gives, image by image, without padding."""

    def forward(self, *args, **kwargs):
        logits = super().forward(*args, **kwargs)
        self.__dict__.setdefault("seen", []).extend(row[row.isfinite()] for row in logits)
        return logits


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("keep", [3, 0.25])
def test_grip_keeps_exactly_the_scorers_highest(family, keep):
    model = build(family)
    batch = make(family_of(family), [1, 2], [7, 9])
    spy = scorer_of(model)
    spy.__class__ = Spy
    with gripvlm.prune(model, Grip(module=spy), keep=keep) as record:
        model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    chosen = [selection for sample in record.selections for selection in sample]
    assert [s.n for s in chosen] == [n for sample in batch.sizes for n in sample]
    assert len(spy.seen) == len(chosen)
    for selection, logits in zip(chosen, spy.seen, strict=True):
        assert selection.k == (keep if isinstance(keep, int) else max(1, int(keep * selection.n + 0.5)))
        assert len(logits) == selection.n
        best = sorted(range(selection.n), key=lambda i: (-float(logits[i]), i))[: selection.k]
        assert selection.indices.tolist() == sorted(best)


def family_of(name: str):
    from tiny_families import TINY

    return TINY[name]


@torch.no_grad()
def test_the_question_reaches_the_scorer(model, inputs):
    """Grip's logits are the scorer's, given the prompt's own words and the share that is kept."""
    spy = scorer_of(model)
    spy.__class__ = Spy
    gripvlm.prune_inputs(model, inputs, Grip(module=spy), 4)
    first = [logits.clone() for logits in spy.seen]
    tokens = gripvlm.visual_tokens(model, inputs)
    for i, mine in enumerate(token for sample in tokens for token in sample):
        assert torch.allclose(one(spy, mine.features, (4, 4), 4 / 16, mine.question), first[i], atol=1e-5)
    spy.seen.clear()
    gripvlm.prune_inputs(model, inputs, Grip(module=spy), 4, question=[[5, 6, 7], [8, 9]])
    assert not torch.allclose(spy.seen[0], first[0], atol=1e-3)


def test_grip_by_name_and_from_a_folder(model, inputs, tmp_path):
    folder = tmp_path / "a grip"
    scorer_of(model).save_pretrained(folder)
    by_name = gripvlm.get_pruner(f"grip:scorer={folder}")
    loaded = Grip.from_pretrained(folder)
    assert isinstance(by_name, Grip)
    assert by_name.needs == {"features", "question"}
    assert str(folder) in repr(loaded)
    kept = []
    for pruner in (by_name, loaded, f"grip:scorer={folder}"):
        _, record = gripvlm.prune_inputs(model, inputs, pruner, 5, return_record=True)
        kept.append([s.indices.tolist() for sample in record.selections for s in sample])
    assert kept[0] == kept[1] == kept[2]
    assert gripvlm.Grip is Grip


def test_grip_without_the_question_does_not_ask_for_it(model, inputs):
    grip = Grip(module=scorer_of(model, question=False))
    assert grip.needs == {"features"}
    assert gripvlm.prune_inputs(model, inputs, grip, 5)["input_ids"].shape[1] < inputs["input_ids"].shape[1]


def test_grip_refuses_another_model_before_anything_runs(model):
    grip = Grip(module=scorer_of(tiny_llava(seed=1)))
    with (
        pytest.raises(ScorerError, match=r"with other weights.*gripvlm train --model"),
        gripvlm.prune(model, grip, keep=4),
    ):
        pytest.fail("the block was entered")
    with pytest.raises(GripError, match="other weights"):
        gripvlm.prune_inputs(model, llava_inputs([1], [5]), grip, 4)
    with pytest.raises(ScorerError, match="pass a folder that exists"):
        gripvlm.get_pruner("grip:scorer=/nowhere/x")


def test_a_model_is_compared_once(monkeypatch):
    """The comparison reads dozens of weights, which every call would pay."""
    vlm, asked, before = tiny_llava(seed=3), [], ModelFingerprint.check
    monkeypatch.setattr(ModelFingerprint, "check", lambda self, model: asked.append(model) or before(self, model))
    grip = Grip(module=scorer_of(vlm))
    for _ in range(3):
        gripvlm.prune_inputs(vlm, llava_inputs([1], [5]), grip, 4)
    assert len(asked) == 1
    with pytest.raises(ScorerError, match="other weights"):
        gripvlm.prune_inputs(tiny_llava(seed=1), llava_inputs([1], [5]), grip, 4)
