"""What training is made of: budgets, data, rollouts, rewards, soft masks and relaxations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gripvlm import prune_inputs
from gripvlm.errors import PrunerError, TrainError
from gripvlm.evaluate import answer, make_inputs
from gripvlm.pruners.base import top_k_of_each
from gripvlm.pruners.given import Given
from gripvlm.tasks import Sample, TaskError
from gripvlm.train import Engine
from gripvlm.train.budgets import draw_keeps
from gripvlm.train.data import Questions, generator, load_questions, split
from gripvlm.train.rewards import probability
from gripvlm.train.teachers import make_teacher
from gripvlm.train.validation import Validator
from tiny_train import Asked, Counted, asked, picture, tiny_config, tiny_scorer, tiny_vlm, write_jsonl


@pytest.fixture(scope="module")
def engine():
    return Engine(*tiny_vlm())


def pairs(task):
    return [(task, sample) for sample in task.samples]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- budgets ------------------------------------------------------------------------------------------------------


def keeps(budgets: str, progress: float = 0.5, groups: int = 4000, n: int = 1000, choices: str = "") -> torch.Tensor:
    config = tiny_config(budgets=budgets, keep_low=0.01, keep_high=0.64, keep_choices=choices)
    return draw_keeps(config, torch.full((groups,), n), torch.arange(groups), progress, drawn())


def test_budgets_lie_between_their_bounds_and_are_distributed_as_they_say():
    for budgets in ("uniform", "log_uniform", "annealed"):
        found = keeps(budgets, 0.0)
        assert 10 <= int(found.min()) <= 11
        assert 600 <= int(found.max()) <= 640
    assert float(keeps("log_uniform").float().median()) == pytest.approx(80, rel=0.1)  # the root of 10 x 640
    assert float(keeps("uniform").float().mean()) == pytest.approx(325, rel=0.05)
    assert keeps("fixed").unique().tolist() == [10]


def test_budgets_that_are_listed_are_drawn_alike_and_no_others():
    found, counts = keeps("choices", choices="0.5,0.03,0.5,1").unique(return_counts=True)
    assert found.tolist() == [30, 500, 1000]
    assert (counts / (4000 / 3) - 1).abs().max() < 0.1
    for budgets, choices, told in (("choices", "", "type --keep-choices"), ("fixed", "0.5", "by budgets = 'choices'")):
        with pytest.raises(TrainError, match=told):
            tiny_config(budgets=budgets, keep_choices=choices)


def test_annealed_budgets_start_even_and_end_at_the_lowest():
    first, middle, last = (keeps("annealed", progress) for progress in (0.0, 0.3, 1.0))
    rungs = first.unique(return_counts=True)
    assert rungs[0].tolist() == [10, 18, 33, 59, 108, 195, 353, 640]
    assert (rungs[1].float() / 500 - 1).abs().max() < 0.2
    assert last.float().eq(10).float().mean() > 0.999
    assert first.float().mean() > middle.float().mean() > last.float().mean()


def test_images_of_a_question_share_their_fraction_and_keep_one_at_least():
    sizes, owner = torch.tensor([100, 50, 1, 40, 7]), torch.tensor([0, 0, 0, 1, 1])
    for seed in range(20):
        kept = draw_keeps(tiny_config(keep_low=0.02, keep_high=1.0), sizes, owner, 0.0, drawn(seed))
        assert abs(int(kept[0]) / 100 - int(kept[1]) / 50) <= 0.02
        assert ((kept >= 1) & (kept <= sizes)).all()
        assert kept[2] == 1


# --- data ---------------------------------------------------------------------------------------------------------


def test_the_stream_is_told_by_seed_and_number_and_an_epoch_is_every_image_once():
    questions = pairs(asked(pictures=7, each=3))
    stream, again, other = (Questions(questions, 2, 2, seed) for seed in (1, 1, 2))
    forward = [[s.id for _, s in stream.batch(i)] for i in range(14)]
    assert [[s.id for _, s in again.batch(i)] for i in reversed(range(14))] == forward[::-1]
    assert [[s.id for _, s in other.batch(i)] for i in range(14)] != forward
    assert len(stream) == 7
    seen = [name.split("-")[0] for batch in forward for name in batch]
    assert all(a == b for a, b in zip(seen[::2], seen[1::2], strict=True))  # two questions an image, side by side
    for epoch in (seen[:14], seen[14:28]):
        assert sorted(epoch[::2]) == [str(i) for i in range(7)]
    assert seen[:14] != seen[14:28]
    assert len({name for batch in forward for name in batch}) > 14  # not the same two questions every time


def test_pictures_of_two_tasks_are_not_mixed_up(tmp_path, engine):
    """Two files that both call their pictures 0.png, and number their questions from 1."""
    write_jsonl(tmp_path / "a", 3)
    write_jsonl(tmp_path / "b", 3)
    for i in range(3):
        picture(50 + i).save(tmp_path / "b" / f"{i}.png")
    questions = [pair for name in "ab" for pair in load_questions(str(tmp_path / name / "q.jsonl"))]
    stream = Questions(questions, 2, 2, 0)
    assert len(stream) == 6
    batch = engine.prepare([questions[0], questions[6]])
    assert not torch.allclose(batch.tokens[0][0].features, batch.tokens[1][0].features)
    stream.skip(questions[0], "why")
    left = [(task.name, s.id) for i in range(3) for task, s in stream.batch(i)]
    assert len(left) == 11
    assert (questions[0][0].name, "1") not in left
    assert (questions[6][0].name, "1") in left


def test_the_same_file_in_two_tasks_is_one_picture(tmp_path):
    file = write_jsonl(tmp_path, 3)
    assert len(Questions(load_questions(str(file)) + load_questions(str(file)), 2, 2, 0)) == 3


def test_a_stream_with_nothing_left_stops():
    stream = Questions(pairs(asked(pictures=1, each=2)), 1, 2, 0)
    stream.skip(stream.questions[0], "first")
    assert [s.id for _, s in stream.batch(0)] == ["0-1"]
    with pytest.raises(TrainError, match="not one of 2 questions can be used; the last: second"):
        stream.skip(stream.questions[1], "second")


def test_split_takes_whole_pictures_and_never_changes():
    questions = pairs(asked(pictures=40, each=2))
    train, held = split(questions, 0.25)
    images = [{s.image_id for _, s in part} for part in (train, held)]
    assert not images[0] & images[1]
    assert len(train) + len(held) == 80
    assert 4 <= len(images[1]) <= 17
    shuffled = [questions[i] for i in torch.randperm(80, generator=drawn()).tolist()]
    assert {s.id for _, s in split(shuffled[:60], 0.25)[1]} <= {s.id for _, s in held}
    assert {s.image_id for _, s in split(questions, 0.5)[1]} > images[1]
    with pytest.raises(TrainError, match="bring more pictures"):
        split(questions[:2], 0.25)
    with pytest.raises(TrainError, match="no questions"):
        load_questions(Asked([]))


def test_streams_of_random_numbers_differ_by_name():
    firsts = [float(torch.rand((), generator=generator(*name))) for name in ((0, "a"), (0, "b"), (1, "a"), (0, "a", 1))]
    assert len(set(firsts)) == 4
    assert firsts[0] == float(torch.rand((), generator=generator(0, "a")))


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
