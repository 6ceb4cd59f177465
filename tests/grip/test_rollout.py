"""What training is made of: rollouts, rewards, validation, teachers and soft masks."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from gripvlm import prune_inputs
from gripvlm.errors import TrainError, UnsupportedModelError
from gripvlm.eval import answer, make_inputs
from gripvlm.grip.train import Engine, Evaluator, distill
from gripvlm.grip.train.distill import FLOOR, get_teacher, masked_forward, missing
from gripvlm.grip.train.rewards import checked_reward, get_reward, log_prob, probability
from gripvlm.grip.train.rollout import tokens_per_forward
from gripvlm.models.hooks.calls import call_hooks
from gripvlm.pruners.base import top_k_of_each
from gripvlm.pruners.baselines.given import Given
from gripvlm.tasks import Sample, TaskError, get_tasks
from places import ROOT
from tiny_train import (
    Asked,
    Counted,
    asked,
    drawn,
    pairs,
    picture,
    tiny_config,
    tiny_scorer,
    tiny_vlm,
    write_several,
)

sys.path.insert(0, str(ROOT))
from experiments.grip_ablation.teachers import best_of, imitate, search


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
    inputs = make_inputs(engine.model, engine.processor, [task.prompt(sample)], [sample.images])
    told = torch.tensor([batch.answers[row]])
    inputs["input_ids"] = torch.cat((inputs["input_ids"], told), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    arguments = prune_inputs(engine.model, inputs, just(kept), len(kept))
    with torch.no_grad():
        logits = engine.model(**arguments).logits[0, -len(told[0]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, told[0][:, None])[:, 0]


@pytest.mark.parametrize("tokens", [16384, 60, 1])
def test_rollouts_equal_single_forwards(engine, batch, tokens, monkeypatch):
    monkeypatch.setattr(engine, "max_tokens_per_forward", tokens)
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


def test_few_tokens_run_together_on_a_cpu_where_no_setting_says_so(engine):
    assert Engine(engine.model, engine.processor).max_tokens_per_forward == 2048
    assert Engine(engine.model, engine.processor, 7).max_tokens_per_forward == 7
    assert tokens_per_forward(torch.device("cuda")) == 16384


def test_rows_may_be_shorter_than_an_answer_elsewhere_in_the_batch(engine, monkeypatch):
    samples = list(asked(pictures=2, each=1).samples)
    samples[0] = replace(samples[0], answer="cat dog red " * 10)
    mixed = engine.prepare(pairs(Asked(samples)))
    monkeypatch.setattr(engine, "max_tokens_per_forward", 1)
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
        Evaluator(engine, pairs(asked(2)), reward, tiny_config(eval_keeps="0.5")).evaluate(scorer)
        monkeypatch.undo()
        assert told == [asked_for]
    assert seen


def test_rows_of_like_length_run_together(engine, batch, monkeypatch):
    """Length is what is kept and the text: the questions and answers here differ by some words."""
    monkeypatch.setattr(engine, "max_tokens_per_forward", 60)
    masks: list[torch.Tensor] = []
    hook = engine.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    rows, kept = [0, 1, 2, 0, 1, 2], [[torch.arange(k)] for k in (5, 1, 1, 3, 7, 4)]
    engine.run(batch, rows, kept)
    hook.remove()
    lengths = torch.cat([mask.sum(-1) for mask in masks]).tolist()
    words = [int(m.sum()) - 16 + len(a) for m, a in zip(batch.prompts["attention_mask"], batch.answers, strict=True)]
    assert len(set(words[:3])) > 1
    assert lengths == sorted(words[row] + len(k[0]) for row, k in zip(rows, kept, strict=True))
    assert 1 < len(masks) < len(rows)
    assert all(mask.numel() <= 60 for mask in masks)


def test_forced_answers_are_the_datas_and_end_as_the_model_ends(engine, batch):
    said = [engine.tokenizer.decode(row[:-1]) for row in batch.answers]
    assert said == [s.answer for s in batch.samples]
    assert all(row[-1] == 2 for row in batch.answers)


def test_exact_is_one_where_greedy_decoding_gives_the_answer(engine):
    task = asked(pictures=1, each=1)
    own = engine.prepare(pairs(task), pseudo_labels=True)
    everything = [[torch.arange(16)]]
    assert engine.run(own, [0], everything).exact.tolist() == [1.0]
    own.inputs["labels"][0, -1] = (own.inputs["labels"][0, -1] + 1) % 90
    assert engine.run(own, [0], everything).exact.tolist() == [0.0]


def test_own_answers_are_what_the_model_says_up_to_its_end(engine, monkeypatch):
    task = asked(pictures=2, each=2)
    inputs = make_inputs(
        engine.model, engine.processor, [s.question for s in task.samples], [s.images for s in task.samples]
    )
    said = engine.model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert engine.prepare(pairs(task), pseudo_labels=True).answers == said.tolist()  # cut off: no end is put behind
    ends = [int(said[0, 3]), int(said[1, 5])]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", ends)
    told = Engine(engine.model, engine.processor).prepare(pairs(task), pseudo_labels=True).answers
    for mine, whole in zip(told, said.tolist(), strict=True):
        stop = min([i for i, token in enumerate(whole) if token in ends], default=15)
        assert mine == whole[: stop + 1]
    assert len(told[0]) <= 4


def test_a_sample_without_an_answer_gets_the_models_own(engine):
    samples = list(asked(pictures=2, each=1).samples)
    samples[1] = Sample(**{**vars(samples[1]), "answer": ""})
    own = engine.prepare(pairs(asked(pictures=2, each=1)), pseudo_labels=True)
    mixed = engine.prepare(pairs(Asked(samples)))
    assert mixed.answers[1] == own.answers[1]
    assert engine.tokenizer.decode(mixed.answers[0][:-1]) == "yes"


@pytest.mark.parametrize("other", ["yes", ""])
def test_an_answer_of_nothing_stops_with_its_id(engine, other):
    samples = [Sample("fine", (lambda: picture(0),), "is there a cat?", other)]
    samples.append(Sample("row 7", (lambda: picture(1),), "is there a cat?", " "))
    with pytest.raises(TrainError, match="'row 7' tokenises to nothing"):
        engine.prepare(pairs(Asked(samples)))


def test_a_picture_that_cannot_be_read_stops_with_its_id(engine, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    task = Asked([Sample("row 9", (tmp_path / "x.png",), "is there a cat?", "yes")])
    with pytest.raises(TaskError, match=r"'row 9'.*not a picture"):
        engine.prepare(pairs(task))


def test_decode_agrees_with_evaluate(engine, batch):
    said = engine.run(batch, ROWS, KEPT).decode()
    for text, row, kept in zip(said, ROWS, KEPT, strict=True):
        sample = batch.samples[row]
        inputs = make_inputs(engine.model, engine.processor, [sample.question], [sample.images])
        alone = answer(engine.model, engine.processor, inputs, just(kept[0]), len(kept[0]), max_new_tokens=5)
        assert [text] == alone.predictions


def test_an_answer_is_as_long_as_its_own_task_allows(engine):
    short = asked(pictures=1, each=2, name="short")
    short.max_new_tokens = 1  # type: ignore[misc]
    long = asked(pictures=1, each=2)
    alone, both = engine.prepare(pairs(short)), engine.prepare(pairs(short) + pairs(long))
    rows, kept = range(len(both)), [[torch.arange(16)]] * len(both)
    said = engine.run(both, rows, kept).decode()
    assert said[:2] == engine.run(alone, rows[:2], kept[:2]).decode()
    assert said[:2] != said[2:]  # the same questions, with more tokens


def test_the_unpruned_logits_are_computed_once(engine, batch):
    rollout = engine.run(batch, ROWS, KEPT)
    full = rollout.full_logits
    assert full.shape == rollout.logits.shape
    assert torch.allclose(full[3], rollout.logits[3], atol=1e-4)  # row 3 keeps everything
    assert (full[0] - rollout.logits[0]).abs().max() > 0.1
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
        return torch.cat(get_teacher("gradient")(engine, batch, kept, drawn()))

    plain, rough = look(engine), look(Engine(engine.model, engine.processor, bf16=True))
    assert (plain - rough).abs().max() > 1e-6
    assert torch.corrcoef(torch.stack((plain, rough)))[0, 1] > 0.95


def test_the_scorer_sees_the_question_or_the_whole_prompt(engine):
    task = asked(pictures=2, each=2)
    task.prompt = lambda sample: f"{sample.question} yes or no?"  # what the benchmarks add is no part of the question
    bare, whole = (engine.prepare(pairs(task), whole_prompt=whole).for_scorer(True) for whole in (False, True))
    lengths = [len(engine.tokenizer(s.question, add_special_tokens=False)["input_ids"]) for s in task.samples]
    assert bare.question_mask.sum(-1).tolist() == lengths
    assert (whole.question_mask.sum(-1) > bare.question_mask.sum(-1)).all()
    assert engine.prepare(pairs(task)).for_scorer(False).question is None
    assert bare.owner.tolist() == [0, 1, 2, 3]
    assert bare.sizes.tolist() == [16] * 4


# --- several pictures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(engine, tmp_path_factory):
    """Questions about one, two, two, the same two, four and one pictures."""
    questions = pairs(get_tasks(f"jsonl:{write_several(tmp_path_factory.mktemp('several'))}")[0])
    questions[2], questions[3] = questions[3], questions[2]  # those about the same pictures side by side
    with Counted(engine.model) as counted:
        batch = engine.prepare(questions)
    assert counted.pictures == 1 + 2 + 2 + 4 + 1
    assert [len(tokens) for tokens in batch.tokens] == [1, 2, 2, 2, 4, 1]
    return batch


def test_rollouts_with_several_pictures_equal_single_forwards(engine, several):
    """Each picture has a subset of its own."""
    rows = [1, 4, 0, 4]
    subsets = [
        [torch.tensor([0, 9]), torch.tensor([3])],
        [torch.tensor([i, i + 5, 15]) for i in range(4)],
        [torch.tensor([2])],
        [torch.arange(16)] * 4,
    ]
    rollout = engine.run(several, rows, subsets)
    for i, (row, kept) in enumerate(zip(rows, subsets, strict=True)):
        sample, told = several.samples[row], torch.tensor([several.answers[row]])
        inputs = make_inputs(engine.model, engine.processor, [several.tasks[row].prompt(sample)], [sample.images])
        inputs["input_ids"] = torch.cat((inputs["input_ids"], told), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        chosen = Given([[torch.zeros(16).index_fill(0, k, 1.0) for k in kept]])
        budget = {len(k) for k in kept}
        if len(budget) == 1:
            arguments = prune_inputs(engine.model, inputs, chosen, budget.pop())
        else:  # no single budget gives these counts: the other tokens are masked instead
            places = (inputs["input_ids"][0] == engine.model.config.image_token_id).nonzero().flatten()
            inputs["attention_mask"][0, places[torch.cat(chosen.scores[0]) == 0]] = 0
            positions = torch.arange(inputs["input_ids"].shape[1])[None]
            arguments = inputs | {"position_ids": positions}
        with torch.no_grad():
            logits = engine.model(**arguments).logits[0, -told.shape[1] - 1 : -1]
        mine = rollout.log_probs[i][rollout.mask[i]]
        assert torch.allclose(mine, logits.log_softmax(-1).gather(-1, told[0][:, None])[:, 0], atol=1e-4)


@pytest.mark.parametrize("teacher", ["attention", "gradient"])
def test_teachers_look_at_each_picture(engine, several, teacher):
    counts = torch.full((12,), 4)
    looks = get_teacher(teacher)(engine, several, counts, drawn())
    assert [len(look) for look in looks] == [16] * 12
    alone = get_teacher(teacher)(engine, engine.prepare([(several.tasks[4], several.samples[4])]), counts[:4], drawn())
    together, apart = torch.cat(looks[7:11]), torch.cat(alone)  # the images of a question are on one scale
    assert torch.allclose(together / together.sum(), apart / apart.sum(), atol=1e-4)


# --- validation and teachers --------------------------------------------------------------------------------------


def test_validation_is_the_mean_over_questions_of_the_scorers_top_k(engine):
    task, scorer = asked(pictures=3, each=2), tiny_scorer(engine.model)
    found = Evaluator(engine, pairs(task), log_prob, tiny_config(eval_keeps="0.5,0.1"), batch_size=4).evaluate(scorer)
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


TEACHERS = [get_teacher("attention"), get_teacher("gradient"), best_of(6), search(8), imitate("random:seed=3")]


@pytest.mark.parametrize("teacher", TEACHERS, ids=["attention", "gradient", "best_of", "search", "imitate"])
def test_teachers_give_weights_of_each_images_tokens(engine, batch, teacher):
    kept = torch.tensor([4, 2, 16, 1])
    looks = teacher(engine, batch, kept, drawn())
    assert [len(look) for look in looks] == [16] * 4
    for look, k in zip(looks, kept.tolist(), strict=True):
        assert float(look.sum()) > 0
        assert (look >= 0).all()
        if teacher in TEACHERS[2:]:
            assert (look > 0).sum() == k


@pytest.fixture
def tried(engine, monkeypatch):
    """The rollouts that the engine runs in a test."""
    run, found = engine.run, []

    def spy(*args, **options):
        found.append(run(*args, **options))
        return found[-1]

    monkeypatch.setattr(engine, "run", spy)
    return found


def test_the_best_of_several_is_the_best(engine, batch, tried):
    looks = best_of(6)(engine, batch, torch.tensor([3, 3, 3, 3]), drawn())
    rewards = (tried[0].log_probs.sum(-1) / tried[0].mask.sum(-1)).view(4, 6)
    for i, look in enumerate(looks):
        best = tried[0].subsets[6 * i + int(rewards[i].argmax())][0]
        assert look.nonzero().flatten().tolist() == best.tolist()


def test_a_search_goes_on_from_the_best_and_returns_the_best_of_all(engine, batch, tried):
    looks = search(8, rounds=4)(engine, batch, torch.tensor([3, 3, 3, 3]), drawn())
    values = torch.stack([(r.log_probs.sum(-1) / r.mask.sum(-1)).view(4, 2) for r in tried])  # [rounds, questions, 2]
    assert values.shape == (4, 4, 2)
    for question, look in enumerate(looks):
        sets = [[set(r.subsets[2 * question + i][0].tolist()) for i in (0, 1)] for r in tried]
        at = int(values[:, question].argmax())
        assert set(look.nonzero().flatten().tolist()) == sets[at // 2][at % 2]
        parent = sets[0][int(values[0, question].argmax())]
        assert all(len(child & parent) == 2 for child in sets[1])  # one of three tokens is changed


def test_unknown_teachers_are_refused_at_once():
    for name in ("nobody", "math:pi", ""):
        with pytest.raises(TrainError, match=r"known are gradient, gradient_at_k, attention, or module"):
            get_teacher(name)
    assert get_teacher("math:sqrt")(4) == 2


# --- soft masks inside the model ----------------------------------------------------------------------------------


def test_no_bias_is_the_plain_forward(engine, batch):
    soft = masked_forward(engine, batch, [torch.zeros(16)] * 4)
    plain = engine.run(batch, range(4), [[torch.arange(16)]] * 4)
    assert torch.allclose(soft, plain.log_probs, atol=1e-4)
    assert (soft[~plain.mask] == 0).all()


def test_a_hard_mask_is_dropping_with_the_places_kept(engine, batch):
    kept = [torch.tensor(k) for k in ([0, 5, 6], [15], [2, 3, 4, 8, 9], list(range(16)))]
    hard = [torch.full((16,), 1e-12).index_fill(0, k, 1.0).log() for k in kept]
    soft = masked_forward(engine, batch, hard)
    dropped = engine.run(batch, range(4), [[k] for k in kept])
    assert torch.allclose(soft, dropped.log_probs, atol=1e-4)
    assert (soft - engine.run(batch, range(4), [[torch.arange(16)]] * 4).log_probs)[:3].abs().amax(-1).min() > 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_gradient_of_a_soft_mask_is_the_finite_difference(engine, batch, attention):
    engine.model.set_attn_implementation(attention)
    try:
        biases = [torch.randn(16, generator=drawn(i)).mul(0.5).requires_grad_() for i in range(4)]
        loss = masked_forward(engine, batch, biases).sum()
        loss.backward()
        for i, token in ((0, 3), (1, 0), (3, 15)):
            ends = []
            for sign in (1, -1):
                moved = [b.detach().clone() for b in biases]
                moved[i][token] += sign * 1e-2
                ends.append(float(masked_forward(engine, batch, moved).sum()))
            assert float(biases[i].grad[token]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=3e-3, rel=0.05)
        assert max(float(b.grad.abs().max()) for b in biases) > 0.02
    finally:
        engine.model.set_attn_implementation("sdpa")


def test_biases_cost_no_matrix_of_queries_and_keys(engine, batch, monkeypatch):
    """Keys carry them: with a mask to be differentiated, kernels would store one weight for each query and key."""
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def attention(query, key, value, attn_mask=None, **options):
        seen.append((key.requires_grad, attn_mask is not None and attn_mask.requires_grad))
        return real(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    biases = [torch.randn(16, generator=drawn(i)).requires_grad_() for i in range(4)]
    masked_forward(engine, batch, biases).sum().backward()
    assert seen == [(True, False)] * 4  # two layers, and again in the backward pass
    assert not any(item.features.requires_grad for sample in batch.encoded.samples for item in sample)


def test_a_bias_below_all_numbers_is_dropping(engine, batch):
    kept = [torch.arange(16) < k for k in (3, 1, 8, 15)]
    biases = [torch.where(mine, 0.0, -torch.inf).requires_grad_() for mine in kept]
    soft = masked_forward(engine, batch, biases)
    dropped = engine.run(batch, range(4), [[mine.nonzero().flatten()] for mine in kept])
    assert torch.allclose(soft, dropped.log_probs, atol=1e-4)
    soft.sum().backward()
    assert all(bool(bias.grad.isfinite().all()) for bias in biases)


def test_layers_that_attend_by_themselves_are_refused(engine, batch, monkeypatch):
    attend = distill.modules_of(engine.model.get_decoder())
    first = {module: layer for module, layer in attend.items() if layer == 0}
    monkeypatch.setattr(distill, "call_hooks", lambda attention: call_hooks(attention={m: attention[m] for m in first}))
    with pytest.raises(UnsupportedModelError, match="layer 1 of llama does not attend through transformers' attention"):
        masked_forward(engine, batch, [torch.zeros(16)] * 4)


def test_scores_with_a_soft_cap_are_refused(engine, batch, monkeypatch):
    layer = engine.model.get_decoder().layers[1].self_attn
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: plain(*args, **kwargs, softcap=30.0))
    with pytest.raises(UnsupportedModelError, match="LlamaAttention caps its scores, so a bias"):
        masked_forward(engine, batch, [torch.zeros(16)] * 4)


def test_the_gradient_teacher_points_at_what_the_answer_hangs_on(engine, batch):
    """Its largest share is the token whose attention, turned down a little, costs the answer most."""
    looks = get_teacher("gradient")(engine, batch, torch.tensor([4] * 4), drawn())
    lengths = torch.tensor([len(answer) for answer in batch.answers])
    costs = []
    for token in range(16):
        one = torch.zeros(16)
        one[token] = -1e-2
        costs.append(-masked_forward(engine, batch, [one] * 4).sum(-1) / lengths)
    before = -masked_forward(engine, batch, [torch.zeros(16)] * 4).sum(-1) / lengths
    loses = (torch.stack(costs, -1) - before[:, None]).clamp(min=0)
    assert (loses > 1e-4).any(-1).sum() >= 2
    for look, lost in zip(looks, loses, strict=True):
        if float(lost.max()) > 1e-4:
            assert int(look.argmax()) == int(lost.argmax())
            assert torch.allclose(look / look.sum(), lost / lost.sum(), atol=0.05)


def test_what_is_missing_is_what_the_answer_would_gain_first(engine, batch):
    kept = [torch.arange(16) < k for k in (3, 0, 8, 15)]
    found = missing(engine, batch, kept)
    biases = [torch.where(mine, 0.0, math.log(FLOOR)) for mine in kept]
    lengths = torch.tensor([len(answer) for answer in batch.answers])
    before = masked_forward(engine, batch, biases).sum(-1) / lengths
    for token in (4, 12, 15):
        more = [bias.index_add(0, torch.tensor([token]), torch.tensor([1e-2])) for bias in biases]
        gain = (masked_forward(engine, batch, more).sum(-1) / lengths - before) / 1e-2
        for look, mine, gained in zip(found, kept, gain, strict=True):
            expected = -1.0 if mine[token] else max(float(gained), 0.0)
            assert float(look[token]) == pytest.approx(expected, abs=2e-3)


def test_the_teacher_at_k_leaves_out_random_sets_of_all_but_one(engine, batch):
    counts = torch.tensor([4, 1, 16, 9])
    first, second = (get_teacher("gradient_at_k")(engine, batch, counts, drawn(seed)) for seed in (0, 1))
    assert [int((look < 0).sum()) for look in first] == [3, 0, 15, 8]
    assert not torch.equal(first[0] < 0, second[0] < 0)


def test_models_whose_masks_are_not_plain_are_refused(engine, batch, monkeypatch):
    def refused(said: str) -> None:
        with pytest.raises(UnsupportedModelError, match=said):
            masked_forward(engine, batch, [torch.zeros(16)] * 4)
        monkeypatch.undo()

    text = engine.model.get_decoder().config
    monkeypatch.setattr(text, "_attn_implementation_internal", "flex_attention")
    refused("flex_attention does not take: load the model with attn_implementation='sdpa'")
    monkeypatch.setattr(text, "sliding_window", 4, raising=False)
    refused("sliding windows, which llama has: train with stage grpo")
    monkeypatch.setattr(engine.model.config, "model_type", "paligemma")
    refused("paligemma images attend in both directions")
    monkeypatch.setattr(engine.model.config, "model_type", "gemma4")  # some of its checkpoints do, some do not
    monkeypatch.setattr(engine.model.config.get_text_config(), "use_bidirectional_attention", "vision", raising=False)
    refused("gemma4 images attend in both directions")


# --- rewards ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rollout(engine, batch):
    return engine.run(
        batch, [0, 1, 1, 3], [[torch.arange(16)], [torch.tensor([1])], [torch.arange(16)], [torch.tensor([0, 9])]]
    )


def test_log_prob_by_hand(rollout):
    found = get_reward("log_prob")(rollout)
    for row, value in enumerate(found.tolist()):
        by_hand = [
            float(rollout.logits[row, t].log_softmax(-1)[rollout.targets[row, t]])
            for t in range(rollout.mask.shape[1])
            if rollout.mask[row, t]
        ]
        assert value == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


def test_agreement_is_nothing_for_all_tokens_and_a_loss_for_fewer(rollout):
    found = checked_reward(get_reward("agreement"), rollout)
    assert found[[0, 2]].abs().max() < 1e-5
    assert (found[[1, 3]] < -0.05).all()
    by_hand = torch.nn.functional.kl_div(
        rollout.logits[1].log_softmax(-1), rollout.full_logits[1].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)[rollout.mask[1]]
    assert float(found[1]) == pytest.approx(-float(by_hand.mean()), abs=1e-4)


def test_task_score_and_exact_match(rollout, monkeypatch):
    monkeypatch.setattr(rollout, "decode", lambda: [rollout.samples[0].answer, "?", rollout.samples[2].answer, "?"])
    assert checked_reward(get_reward("task_score"), rollout).tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(rollout, "hit", torch.ones_like(rollout.mask))
    assert checked_reward(get_reward("exact_match"), rollout).tolist() == [1, 1, 1, 1]
    rollout.hit[1, -1] = False
    assert checked_reward(get_reward("exact_match"), rollout).tolist() == [1, 0, 1, 1]


def raises(rollout):
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda r: torch.tensor([0, torch.nan, 0, 0]), "is nan for sample '0-1'"),
        (lambda r: torch.tensor([0, 0, 0, -torch.inf]), "is -inf for sample '1-1'"),
        (lambda r: torch.zeros(3), r"must return a tensor \(4,\), got \(3,\)"),
        (lambda r: torch.zeros(4, 1), r"must return a tensor \(4,\), got \(4, 1\)"),
        (lambda r: [0.0] * 4, r"must return a tensor \(4,\), got list"),
        (lambda r: None, "got NoneType"),
        (raises, r"'raises' raised RuntimeError: no luck \(samples 0-0, 0-1, 1-1\)"),
    ],
)
def test_a_reward_that_fails_stops_and_is_never_zero(rollout, reward, said):
    with pytest.raises(TrainError, match=said):
        checked_reward(reward, rollout)


def test_rewards_of_ones_own(rollout):
    assert get_reward("math:sqrt")(4) == 2
    assert get_reward(raises) is raises
    values = checked_reward(lambda r: torch.tensor([True, False, True, True]), rollout)
    assert (values.dtype, values.tolist()) == (torch.float32, [1, 0, 1, 1])
    assert not checked_reward(lambda r: r.log_probs.sum(-1).requires_grad_(), rollout).requires_grad
    for name in ("nonsense", "no.such.module:f", "math:nothing", "math:pi", "a"):
        with pytest.raises(TrainError, match=r"no reward|unknown reward .* agreement, exact_match"):
            get_reward(name)
