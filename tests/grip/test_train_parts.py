"""What training is made of: rollouts, validation and teachers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gripvlm import prune_inputs
from gripvlm.errors import PrunerError, TrainError
from gripvlm.eval import answer, make_inputs
from gripvlm.grip.train import Engine
from gripvlm.grip.train.rewards import probability
from gripvlm.grip.train.teachers import make_teacher
from gripvlm.grip.train.validation import Validator
from gripvlm.pruners.base import top_k_of_each
from gripvlm.pruners.baselines.given import Given
from gripvlm.tasks import Sample, TaskError
from tiny_train import Asked, Counted, asked, drawn, pairs, picture, tiny_config, tiny_scorer, tiny_vlm


@pytest.fixture(scope="module")
def engine():
    return Engine(*tiny_vlm())


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(engine):
    """Two pictures, two questions of unlike length and answers of unlike length about each."""
    with Counted(engine.model) as counted:
        batch = engine.prepare(pairs(asked(pictures=2, each=2)))
    assert counted.pictures == 2
    return batch


ROWS = [0, 3, 0, 2, 1]
KEPT = [[torch.tensor(k)] for k in ([0, 3, 7, 9, 15], [4], [2, 5], list(range(16)), [1, 8, 9])]


def just(kept: torch.Tensor) -> Given:
    """Keeps just these of 16 tokens."""
    return Given([[torch.zeros(16).index_fill(0, kept, 1.0)]])


def alone(engine, batch, row: int, kept: torch.Tensor) -> torch.Tensor:
    """[t] log-probabilities by one plain forward of one prompt and its answer."""
    task, sample = batch.tasks[row], batch.samples[row]
    inputs = make_inputs(engine.model, engine.processor, [task.prompt(sample)], [sample.image])
    told = torch.tensor([batch.answers[row]])
    inputs["input_ids"] = torch.cat((inputs["input_ids"], told), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    arguments = prune_inputs(engine.model, inputs, just(kept), len(kept))
    with torch.no_grad():
        logits = engine.model(**arguments).logits[0, -len(told[0]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, told[0][:, None])[:, 0]


@pytest.mark.parametrize("rows", [128, 2])
def test_rollouts_equal_single_forwards(engine, batch, rows, monkeypatch):
    monkeypatch.setattr(engine, "rows", rows)
    with Counted(engine.model) as counted:
        rollout = engine.run(batch, ROWS, KEPT)
    assert counted.pictures == 0
    assert [s.id for s in rollout.samples] == [batch.samples[r].id for r in ROWS]
    for i, (row, kept) in enumerate(zip(ROWS, KEPT, strict=True)):
        mine = rollout.log_probs[i][rollout.mask[i]]
        assert torch.allclose(mine, alone(engine, batch, row, kept[0]), atol=1e-4)
        assert rollout.targets[i][rollout.mask[i]].tolist() == batch.answers[row]
    assert (rollout.log_probs[~rollout.mask] == 0).all()
    assert rollout.mask.sum(-1).tolist() == [len(batch.answers[row]) for row in ROWS]


def test_rows_may_be_shorter_than_an_answer_elsewhere_in_the_batch(engine, monkeypatch):
    samples = list(asked(pictures=2, each=1).samples)
    samples[0] = replace(samples[0], answer="cat dog red " * 10)
    mixed = engine.prepare(pairs(Asked(samples)))
    monkeypatch.setattr(engine, "rows", 1)
    kept = torch.tensor([3])
    rollout = engine.run(mixed, [0, 1], [[kept], [kept]])
    assert rollout.log_probs.shape[1] > len(engine.pruned(mixed, mixed.inputs, [1], [[kept]])["input_ids"][0])
    for row in (0, 1):
        mine = rollout.log_probs[row][rollout.mask[row]]
        assert torch.allclose(mine, alone(engine, mixed, row, kept), atol=1e-4)


def test_logits_are_kept_where_they_are_read(engine, batch, monkeypatch):
    kept, lean = (engine.run(batch, ROWS, KEPT, logits=logits) for logits in (True, False))
    assert torch.equal(kept.log_probs, lean.log_probs)
    assert torch.equal(kept.hit & kept.mask, lean.hit & lean.mask)
    assert torch.equal(kept.hit[kept.mask], (kept.logits.argmax(-1) == kept.targets)[kept.mask])
    with pytest.raises(RuntimeError, match="kept no logits"):
        lean.logits.sum()
    seen = []

    def mine(rollout):
        seen.append(rollout.logits.shape)
        return rollout.log_probs.sum(-1)

    scorer = tiny_scorer(engine.model)
    for reward, asked_for in ((mine, True), (probability, False)):
        before = engine.run
        told = []
        monkeypatch.setattr(
            engine, "run", lambda *a, logits, run=before, told=told: (told.append(logits), run(*a, logits=logits))[1]
        )
        Validator(engine, pairs(asked(2)), [0.5], reward).judge(scorer)
        monkeypatch.undo()
        assert told == [asked_for]
    assert seen


def test_rows_of_like_length_run_together(engine, batch, monkeypatch):
    """Length is what is kept and the text: the questions and answers here differ by some words."""
    monkeypatch.setattr(engine, "rows", 2)
    masks: list[torch.Tensor] = []
    hook = engine.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    rows, kept = [0, 1, 2, 0, 1, 2], [[torch.arange(k)] for k in (5, 1, 1, 3, 7, 4)]
    before = engine.subsets
    engine.run(batch, rows, kept)
    hook.remove()
    lengths = torch.cat([mask.sum(-1) for mask in masks]).tolist()
    words = [int(m.sum()) - 16 + len(a) for m, a in zip(batch.prompts["attention_mask"], batch.answers, strict=True)]
    assert len(set(words[:3])) > 1
    assert lengths == sorted(words[row] + len(k[0]) for row, k in zip(rows, kept, strict=True))
    assert engine.subsets == before + 6


def test_forced_answers_are_the_datas_and_end_as_the_model_ends(engine, batch):
    said = [engine.tokenizer.decode(row[:-1]) for row in batch.answers]
    assert said == [s.answer for s in batch.samples]
    assert all(row[-1] == 2 for row in batch.answers)


def test_exact_is_one_where_greedy_decoding_gives_the_answer(engine):
    task = asked(pictures=1, each=1)
    own = engine.prepare(pairs(task), own=True)
    everything = [[torch.arange(16)]]
    assert engine.run(own, [0], everything).exact.tolist() == [1.0]
    own.inputs["labels"][0, -1] = (own.inputs["labels"][0, -1] + 1) % 90
    assert engine.run(own, [0], everything).exact.tolist() == [0.0]


def test_own_answers_are_what_the_model_says_up_to_its_end(engine, monkeypatch):
    task = asked(pictures=2, each=2)
    inputs = make_inputs(
        engine.model, engine.processor, [s.question for s in task.samples], [s.image for s in task.samples]
    )
    said = engine.model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert engine.prepare(pairs(task), own=True).answers == said.tolist()  # cut off: no end is put behind
    ends = [int(said[0, 3]), int(said[1, 5])]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", ends)
    told = Engine(engine.model, engine.processor).prepare(pairs(task), own=True).answers
    for mine, whole in zip(told, said.tolist(), strict=True):
        stop = min([i for i, token in enumerate(whole) if token in ends], default=15)
        assert mine == whole[: stop + 1]
    assert len(told[0]) <= 4


def test_a_sample_without_an_answer_gets_the_models_own(engine):
    samples = list(asked(pictures=2, each=1).samples)
    samples[1] = Sample(**{**vars(samples[1]), "answer": ""})
    own = engine.prepare(pairs(asked(pictures=2, each=1)), own=True)
    mixed = engine.prepare(pairs(Asked(samples)))
    assert mixed.answers[1] == own.answers[1]
    assert engine.tokenizer.decode(mixed.answers[0][:-1]) == "yes"


@pytest.mark.parametrize("other", ["yes", ""])
def test_an_answer_of_nothing_stops_with_its_id(engine, other):
    samples = [Sample("fine", lambda: picture(0), "is there a cat?", other)]
    samples.append(Sample("row 7", lambda: picture(1), "is there a cat?", " "))
    with pytest.raises(TrainError, match="'row 7' tokenises to nothing"):
        engine.prepare(pairs(Asked(samples)))


def test_a_picture_that_cannot_be_read_stops_with_its_id(engine, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    task = Asked([Sample("row 9", tmp_path / "x.png", "is there a cat?", "yes")])
    with pytest.raises(TaskError, match=r"'row 9'.*not a picture"):
        engine.prepare(pairs(task))


def test_decode_agrees_with_evaluate(engine, batch):
    said = engine.run(batch, ROWS, KEPT).decode()
    for text, row, kept in zip(said, ROWS, KEPT, strict=True):
        sample = batch.samples[row]
        inputs = make_inputs(engine.model, engine.processor, [sample.question], [sample.image])
        alone = answer(engine.model, engine.processor, inputs, just(kept[0]), len(kept[0]), max_new_tokens=5)
        assert [text] == alone.predictions


def test_the_unpruned_logits_are_computed_once(engine, batch):
    rollout = engine.run(batch, ROWS, KEPT)
    full = rollout.full_logits
    assert full.shape == rollout.logits.shape
    assert torch.allclose(full[3], rollout.logits[3], atol=1e-4)  # row 3 keeps everything
    assert (full[0] - rollout.logits[0]).abs().max() > 0.1
    assert batch.full is not None
    engine.model.forward, before = None, engine.model.forward
    try:
        assert torch.equal(rollout.full_logits, full)
    finally:
        engine.model.forward = before


def test_autocast_is_off_unless_asked_for(engine, batch):
    assert not tiny_config().bf16
    plain = engine.run(batch, [0], KEPT[:1]).logits
    rough = Engine(engine.model, engine.processor, bf16=True).run(batch, [0], KEPT[:1]).logits
    assert rough.dtype == torch.float32
    assert 1e-4 < (plain - rough).abs().max() < 1.0


def test_autocast_reaches_the_soft_masks_and_hardly_changes_the_gradient(engine, batch):
    def look(engine: Engine) -> torch.Tensor:
        kept = torch.ones(len(batch), dtype=torch.long)
        return torch.cat(make_teacher("gradient")(engine, batch, kept, drawn()))

    plain, rough = look(engine), look(Engine(engine.model, engine.processor, bf16=True))
    assert (plain - rough).abs().max() > 1e-6
    assert torch.corrcoef(torch.stack((plain, rough)))[0, 1] > 0.95


def test_the_scorer_sees_the_question_or_the_whole_prompt(engine):
    task = asked(pictures=2, each=2)
    bare, whole = (engine.prepare(pairs(task), whole=whole).for_scorer(True) for whole in (False, True))
    lengths = [len(engine.tokenizer(s.question, add_special_tokens=False)["input_ids"]) for s in task.samples]
    assert bare.asked.sum(-1).tolist() == lengths
    assert (whole.asked.sum(-1) > bare.asked.sum(-1)).all()
    assert engine.prepare(pairs(task)).for_scorer(False).question is None
    assert bare.owner.tolist() == [0, 1, 2, 3]
    assert bare.sizes.tolist() == [16] * 4


# --- validation and teachers --------------------------------------------------------------------------------------


def test_validation_is_the_mean_over_questions_of_the_scorers_top_k(engine):
    task, scorer = asked(pictures=3, each=2), tiny_scorer(engine.model)
    found = Validator(engine, pairs(task), [0.5, 0.1], size=4).judge(scorer)
    by_hand = {0.5: 0.0, 0.1: 0.0}
    for pair in pairs(task):
        batch = engine.prepare([pair])
        seen = batch.for_scorer(True)
        for keep in by_hand:
            k = torch.tensor([{0.5: 8, 0.1: 2}[keep]])
            top = top_k_of_each(seen.score(scorer, k), k.tolist())
            by_hand[keep] += float(alone(engine, batch, 0, top[0]).mean()) / 6
    assert found["reward@0.5"] == pytest.approx(by_hand[0.5], abs=1e-4)
    assert found["reward@0.1"] == pytest.approx(by_hand[0.1], abs=1e-4)
    assert found["objective"] == pytest.approx((by_hand[0.5] + by_hand[0.1]) / 2, abs=1e-4)


@pytest.mark.parametrize("name", ["attention", "gradient", "best_of_n", "pruner:random:seed=3"])
def test_teachers_give_a_distribution_over_each_images_tokens(engine, batch, name):
    kept = torch.tensor([4, 2, 16, 1])
    looks = make_teacher(name, tries=6)(engine, batch, kept, drawn())
    assert [len(look) for look in looks] == [16] * 4
    for look, k in zip(looks, kept.tolist(), strict=True):
        assert float(look.sum()) == pytest.approx(1, abs=1e-4)
        assert (look >= 0).all()
        if name in ("best_of_n", "pruner:random:seed=3"):
            assert (look > 0).sum() == k


def test_best_of_n_is_the_best(engine, batch, monkeypatch):
    tried = []
    run = engine.run

    def spy(*args, **options):
        tried.append(run(*args, **options))
        return tried[-1]

    monkeypatch.setattr(engine, "run", spy)
    kept = torch.tensor([3, 3, 3, 3])
    looks = make_teacher("best_of_n", tries=6)(engine, batch, kept, drawn())
    rewards = (tried[0].log_probs.sum(-1) / tried[0].mask.sum(-1)).view(4, 6)
    for i, look in enumerate(looks):
        best = tried[0].kept[6 * i + int(rewards[i].argmax())][0]
        assert look.nonzero().flatten().tolist() == best.tolist()


def test_unknown_teachers_are_refused_at_once():
    for name in ("nobody", "pruner:", ""):
        with pytest.raises(TrainError, match=r"attention, gradient, best_of_n, pruner:NAME"):
            make_teacher(name)
    with pytest.raises(PrunerError, match="nobody"):
        make_teacher("pruner:nobody")
    with pytest.raises(TrainError, match="looks inside the model"):
        make_teacher("pruner:fastv")
