"""A scorer with a stage inside the vision tower: its law, its rollouts, its training, and the pruner that it makes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import gripvlm
from gripvlm.errors import InputError, PrunerError, TrainError, UnsupportedModelError
from gripvlm.grip.closeness import Closeness
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.pruner import Grip
from gripvlm.grip.rounds import Penalty, Rounds
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Engine, train
from gripvlm.grip.train.distill import Distill
from gripvlm.grip.train.two_stages import TwoStageGrpo, TwoStages, best_of_two_stages
from gripvlm.pruners import get_pruner
from gripvlm.pruners.baselines.given import Given
from tiny_families import build
from tiny_train import asked, drawn, pairs, picture, stopping, tiny_config, tiny_scorer, tiny_vlm, write_several

BLOCK = 1


@pytest.fixture(scope="module")
def vlm():
    model, processor = tiny_vlm()
    model.config.vision_feature_layer = -1  # so that both blocks of its tower count
    return model, processor


@pytest.fixture(scope="module")
def engine(vlm):
    return Engine(*vlm, tower_block=BLOCK)


@pytest.fixture(scope="module")
def batch(engine):
    return engine.prepare(pairs(asked(pictures=2, each=2)))


def two_stages(model, **changes) -> Scorer:
    scorer = tiny_scorer(model, **changes).with_tower(BLOCK, model.config.vision_config.hidden_size)
    torch.manual_seed(3)
    torch.nn.init.normal_(scorer.tower.scorer.score.weight, std=0.3)
    return scorer.eval()


def marked(rows: torch.Tensor, n: int) -> Given:
    """Keeps those rows."""
    return Given(((torch.zeros(n).index_fill(0, rows, 1.0),),))


# --- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
def test_probabilities_of_all_pairs_are_those_of_their_definition_and_sum_to_one(rounds):
    """n = 4, k' = 3, k = 2, every ordered pair: both policies from their definition, step by step."""
    n, k_tower, k = 4, 3, 2
    inside = torch.tensor([[0.3, -1.0, 1.2, 0.1]], dtype=torch.float64)
    behind = torch.randn(4, 4, generator=drawn(1), dtype=torch.float64)  # [who was dropped, token]
    features = torch.randn(1, n, 3, generator=drawn(2))
    cells = torch.arange(n).float()[None, :, None].expand(1, n, 2)

    def law(logits, count, rows):
        if rounds == 1:
            return PlackettLuce(logits, count)
        close = Closeness(
            features[:, rows].expand(len(logits), -1, -1), cells[:, rows].expand(len(logits), -1, -1), None
        )
        return Rounds(logits, count, None, Penalty(rounds, torch.ones(len(logits)), close))

    total = 0.0
    for passed in itertools.permutations(range(n), k_tower):
        rows = sorted(passed)
        (dropped,) = {*range(n)} - {*rows}
        logits = behind[dropped, rows][None]
        for kept in itertools.permutations(range(k_tower), k):
            samples = torch.tensor([[[*passed, *kept]]])
            found = TwoStages(law(inside, k_tower, list(range(n))), law(logits, k, rows)).log_prob(samples).exp().item()
            if rounds == 1:
                wanted, left, chosen = 1.0, inside[0].exp(), list(passed)
                for j, item in enumerate(chosen):
                    wanted *= float(left[item] / left[[i for i in range(n) if i not in chosen[:j]]].sum())
                left = logits[0].exp()
                for j, item in enumerate(kept):
                    wanted *= float(left[item] / left[[i for i in range(k_tower) if i not in kept[:j]]].sum())
                assert found == pytest.approx(wanted, rel=1e-6)
            total += found
    assert total == pytest.approx(1.0, abs=1e-6)


def test_draws_have_the_probability_that_training_gives_them(engine, batch, vlm):
    """Across questions with unlike budgets: the stored log-probabilities are those of a law made anew."""
    grpo = TwoStageGrpo(tiny_config(), two_stages(vlm[0], rounds=2), engine)
    draws = grpo._draw(batch, drawn())
    again = grpo.policy(grpo.scorer, draws.inputs, draws.counts).step_log_probs(draws.samples)
    assert torch.allclose(again, draws.old, atol=1e-5)
    assert ((draws.samples >= 0).sum(-1) == (draws.counts + draws.inputs.tower_counts)[:, None]).all()
    assert (draws.inputs.tower_counts >= draws.counts).all()
    assert len(draws.counts.unique()) > 1


def test_the_warm_up_teaches_the_stage_inside_the_tower(engine, batch, vlm):
    """With all other weights held, its divergence from the teacher falls."""
    scorer = two_stages(vlm[0])
    stage = Distill(tiny_config(tower_block=BLOCK, tower_low=0.3, tower_high=0.8), scorer, engine)
    optimizer = torch.optim.Adam(scorer.tower.parameters(), lr=3e-3)
    found = []
    for _ in range(15):
        ((loss, stats),) = stage.losses(batch, 0.0, drawn())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(stats["kl_teacher_tower"])
    assert found[-1] < 0.7 * found[0]


def test_agreement_compares_with_the_whole_tower(engine, vlm):
    """Not with the tower of the draws, of which most rows are zeros."""
    batch = engine.prepare(pairs(asked(pictures=2, each=1)))
    whole = engine.run(engine.prepare(pairs(asked(pictures=2, each=1))), range(2), batch.everything).logits
    grpo = TwoStageGrpo(tiny_config(reward_funcs="agreement"), two_stages(vlm[0]), engine)
    seen = []
    before = engine.run

    def run(*args, **kwargs):
        rollout = before(*args, **kwargs)
        seen.append(rollout)
        return rollout

    engine.run = run
    try:
        grpo._draw(batch, drawn())
    finally:
        del engine.run
    assert torch.allclose(seen[-1].full_logits, whole[torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])], atol=1e-5)


# --- the model ----------------------------------------------------------------------------------------------------


def test_rollouts_run_the_forward_of_the_pruner(engine, batch, vlm):
    """The logits, fp32, are those after `tower` made the same choice from pixels, whatever else is in the batch."""
    model, processor = vlm
    rows, kept = [0, 3, 3], [torch.tensor([1, 2, 7, 9]), torch.tensor([0, 3, 8, 15]), torch.tensor([4, 5, 6])]
    left = engine.rerun(batch, rows, kept)
    subsets = [[each[torch.tensor([0, 2])]] for each in kept]
    rollout = engine.run(left, range(3), subsets, logits=True)
    for r, row in enumerate(rows):
        inside, behind = marked(kept[r], 16), marked(torch.tensor([0, 2]), len(kept[r]))
        inputs = {name: value[[row]] for name, value in batch.inputs.items()}
        pixels = processor.image_processor(picture(row // 2), return_tensors="pt")["pixel_values"]
        labels = inputs.pop("labels")
        tower = get_pruner("tower", inner=(inside, behind), block=BLOCK, tower_keep=len(kept[r]))
        arguments = gripvlm.prune_inputs(model, {**inputs, "pixel_values": pixels}, tower, keep=2)
        with torch.no_grad():
            logits = model(**arguments).logits[:, -left.longest - 1 : -1]
        answer = labels[0, -left.longest :] >= 0
        assert torch.allclose(rollout.logits[r][answer], logits[0][answer], atol=1e-5)


def test_the_pruner_keeps_what_validation_keeps(engine, vlm, tmp_path):
    """The greedy choice of both stages, from a saved folder and pixels; one prompt at a time."""
    model, processor = vlm
    scorer = two_stages(model, rounds=2)
    scorer.save_pretrained(tmp_path)
    task = asked(pictures=3, each=1)
    batch = engine.prepare(pairs(task))
    _, subsets = best_of_two_stages(engine, scorer, batch, 0.25, 0.5)
    spec = f"tower(grip:scorer={tmp_path}):block={BLOCK},tower_keep=50%"
    assert get_pruner(spec).needs >= {"question", "tower_rows"}
    for row, sample in enumerate(task.samples):
        pixels = processor.image_processor(picture(row), return_tensors="pt")["pixel_values"]
        words = processor.tokenizer(sample.question, add_special_tokens=False)["input_ids"]
        inputs = {name: value[[row]] for name, value in batch.prompts.items()}
        _, record = gripvlm.prune_inputs(
            model, {**inputs, "pixel_values": pixels}, spec, keep=0.25, question=[words], return_record=True
        )
        assert record.selections[0][0].indices.tolist() == subsets[row][0].tolist()
        assert record.selections[0][0].tower == 8


def test_the_stage_inside_the_tower_reads_the_question(batch, vlm):
    scorer = two_stages(vlm[0])
    inputs = batch.for_tower_stage(True)
    logits = inputs.score(scorer.tower, torch.full((4,), 4))
    # Questions 0 and 1 are about one picture.
    assert torch.equal(inputs.features[0], inputs.features[1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_only_blocks_behind_the_choice_run_again(engine, batch, vlm):
    """Pixels, and blocks ahead, are not touched: with both broken the features are the same."""
    model, kept = vlm[0], [torch.tensor([1, 2, 7])]
    before = engine.rerun(batch, [1], kept).tokens[0][0].features
    layers = model.get_encoder("image").encoder.layers if hasattr(model.get_encoder("image"), "encoder") else None
    tower = layers if layers is not None else model.get_encoder("image").vision_model.encoder.layers
    weight = tower[0].mlp.fc1.weight
    kept_weight = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        assert torch.equal(engine.rerun(batch, [1], kept).tokens[0][0].features, before)
    finally:
        with torch.no_grad():
            weight.copy_(kept_weight)
    # And the tower is its own again afterwards.
    whole = engine.prepare(pairs(asked(pictures=2, each=2)))
    assert torch.equal(whole.tokens[0][0].features, batch.tokens[0][0].features)


# --- places behind the tower --------------------------------------------------------------------------------------


def test_behind_the_tower_grip_knows_where_tokens_lie(vlm):
    """Logits of what the tower left are those of the same rows masked out of all, at the same share."""
    model, processor = vlm
    seen = []

    class Look(Grip):
        def _select(self, groups):
            seen.extend(tokens for group in groups for tokens in group)
            return super()._select(groups)

    look = Look(module=tiny_scorer(model))
    rows = torch.tensor([1, 2, 7, 9])
    tower = get_pruner("tower", inner=(marked(rows, 16), look), block=BLOCK, tower_keep=4)
    engine = Engine(model, processor)
    batch = engine.prepare(pairs(asked(pictures=1, each=1)))
    pixels = processor.image_processor(picture(0), return_tensors="pt")["pixel_values"]
    gripvlm.prune_inputs(model, {**batch.prompts, "pixel_values": pixels}, tower, keep=2)
    (tokens,) = seen
    inputs = gripvlm.grip.pruner.ScorerInputs.of([tokens], True)
    wanted = torch.tensor([[0.5, 1.5], [0.5, 2.5], [1.5, 3.5], [2.5, 1.5]])
    assert torch.equal(inputs.cells[0], wanted)
    assert torch.equal(inputs.places[0], wanted / 4)


# --- training -----------------------------------------------------------------------------------------------------

STAGED = {"tower_block": BLOCK, "tower_low": 0.3, "tower_high": 0.8}


def test_training_changes_both_stages_and_resumes_bit_for_bit(vlm, tmp_path, monkeypatch):
    settings = {**STAGED, "rounds": 2, "save_steps": 2}
    whole = train(tiny_config(output_dir=str(tmp_path / "a"), **settings), *vlm, asked(8))
    config = tiny_config(output_dir=str(tmp_path / "b"), **settings)
    with monkeypatch.context() as patched:
        stopping(patched, 4)
        with pytest.raises(gripvlm.errors.Interrupted):
            train(config, *vlm, asked(8))
    resumed = train(config, *vlm, asked(8))
    assert resumed.weights == whole.weights
    first = Scorer.from_pretrained(tmp_path / "a" / "distill")
    changed = {
        name
        for name, value in Scorer.from_pretrained(tmp_path / "a").state_dict().items()
        if not torch.equal(value, first.state_dict()[name])
    }
    assert "score.weight" in changed
    assert {"tower.lift.1.weight", "tower.scorer.score.weight"} <= changed
    assert get_pruner(f"tower(grip:scorer={tmp_path / 'a'}):block={BLOCK},tower_keep=50%").inside.needs


def test_a_scorer_without_that_stage_gets_one(vlm, tmp_path):
    """--init-from an older scorer: its own choice is as it was, the new stage starts from its weights."""
    old = tiny_scorer(vlm[0])
    old.save_pretrained(tmp_path / "old")
    config = tiny_config(
        output_dir=str(tmp_path / "new"),
        init_from=str(tmp_path / "old"),
        stage="grpo",
        max_steps=0,
        rounds=1,
        joint=False,
        **STAGED,
    )
    assert config.joint is False
    config = replace(config, rounds=16, joint=True)  # the defaults, which ask for nothing
    scorer = train(config, *vlm, asked(8)).module
    assert scorer.config.tower_block == BLOCK
    own = old.state_dict()
    assert all(torch.equal(scorer.state_dict()[name], own[name]) for name in own)
    assert torch.equal(scorer.tower.scorer.score.weight, own["score.weight"])


def test_files_of_a_scorer_without_that_stage_are_as_before(vlm, tmp_path):
    tiny_scorer(vlm[0]).save_pretrained(tmp_path)
    assert "tower" not in (tmp_path / "config.json").read_text().split('"base"')[0]


def test_refusals_say_what_to_do(vlm, tmp_path):
    model, processor = vlm
    scorer = two_stages(model)
    scorer.save_pretrained(tmp_path / "two")
    tiny_scorer(model).save_pretrained(tmp_path / "one")
    with pytest.raises(PrunerError, match=r"no stage inside the vision tower: train one with `gripvlm train --tower-b"):
        get_pruner(f"tower(grip:scorer={tmp_path / 'one'})")
    stages = get_pruner(f"tower(mmr(grip:scorer={tmp_path / 'two'})):block=1")
    assert type(stages.inside.inner) is not Grip  # also inside a wrapper it is the stage of the tower
    assert type(stages.behind.inner) is Grip
    with pytest.raises(PrunerError, match="before block 1 of the vision tower, not 0: pass block=1"):
        get_pruner(f"tower(grip:scorer={tmp_path / 'two'}):block=0")
    with pytest.raises(TrainError, match="tower_block = 0"):
        tiny_config(tower_block=0)
    with pytest.raises(TrainError, match=r"tower_low = 0\.9, tower_high = 0\.5"):
        tiny_config(tower_block=1, tower_low=0.9, tower_high=0.5)
    with pytest.raises(InputError, match="drops before block 7"):
        Engine(model, processor, tower_block=7)
    several = replace(tiny_config(**STAGED), data=str(write_several(tmp_path / "data")), output_dir=str(tmp_path / "r"))
    with pytest.raises(TrainError, match="questions about one picture, in one piece"):
        train(several, *vlm)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next"])
def test_towers_that_cannot_run_again_are_refused_with_the_reason(name):
    from gripvlm.models.families import family_of
    from gripvlm.models.hooks.tower_replay import checked_replay

    model = build(name)
    reason = "each image as a sequence of its own" if name == "qwen2_5_vl" else "not supported, as"
    with pytest.raises(UnsupportedModelError, match=reason):
        checked_replay(model, family_of(model), 1)
