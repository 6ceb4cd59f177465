"""The worker on every family: what a batch of requests gets is what each alone gets from `gripvlm.prune`."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch

import gripvlm
from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.grip.fingerprint import ModelFingerprint
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.models import FAMILIES
from gripvlm.serve.metrics import Metrics
from gripvlm.serve.prompts import Prompt
from gripvlm.serve.settings import Limits, Settings
from gripvlm.serve.worker import Answer, Job, Worker, requests_of
from tiny_families import TINY, build, make

KEEPS: list[Any] = [3, "50%", 5, "<=2"]
IMAGES, WORDS = [1, 2, 1, 1], [7, 9, 12, 8]
LENGTHS = [6, 2, 4, 6]


class Numbers:
    """A tokenizer whose text is the numbers of the tokens."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{number} " for number in ids)


def worker_of(model: Any, pruners: tuple[str, ...], **limits: Any) -> Worker:
    settings = Settings("tiny", pruners, Budget(0.5), limits=Limits(**limits))
    return Worker(model, Numbers(), requests_of(model, settings), settings, Metrics())


def job_of(inputs: Any, pruner: str | None, keep: Any, max_tokens: int = 4, visual: int = 0, **options: Any) -> Any:
    """A job, and what it was sent."""
    sent: queue.Queue[Any] = queue.Queue()
    budget = None if keep is None else Budget(keep)
    key = b"" if pruner is None else inputs["input_ids"].numpy().tobytes()
    return Job(Prompt(inputs, key, pruner, budget, (5, 6), visual, max_tokens, **options), sent.put), sent


def result(sent: queue.Queue[Any]) -> tuple[list[int], Any]:
    """The tokens that were sent, and how it ended."""
    text = ""
    while isinstance(piece := sent.get(timeout=60), str):
        text += piece
    return [int(number) for number in text.split()], piece


def alone(model: Any, inputs: Any, pruner: str, keep: Any, most: int) -> list[int]:
    question = torch.tensor([5, 6])
    with gripvlm.prune(model, pruner, keep=keep, question=question):
        ids = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return ids[0, -most:].tolist()


@pytest.mark.parametrize("pruner", ["random", "cdpruner", "fastv"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_batch_of_budgets_and_lengths_gets_what_each_alone_gets(name, pruner):
    model = build(name)
    if pruner == "fastv" and not FAMILIES[name].layers:
        with pytest.raises(GripError, match="drops inside"):
            worker_of(model, (pruner,))
        return
    keeps: list[Any] = ["70%", "60%", "80%", "70%"] if pruner == "fastv" else KEEPS
    prompts = [make(TINY[name], IMAGES, WORDS, only=i).inputs for i in range(len(IMAGES))]
    expected = [alone(model, *case) for case in zip(prompts, [pruner] * 4, keeps, LENGTHS, strict=True)]
    worker = worker_of(model, (pruner,))
    jobs = [job_of(inputs, pruner, *case) for inputs, *case in zip(prompts, keeps, LENGTHS, strict=True)]
    for job, _ in jobs:
        worker.submit(job)
    worker.start()
    got = [result(sent) for _, sent in jobs]
    worker.close()
    assert [answer for _, answer in got if not isinstance(answer, Answer)] == []
    assert [tokens for tokens, _ in got] == expected
    assert [answer.keep for _, answer in got] == [Budget(keep) for keep in keeps]


@pytest.mark.parametrize("name", sorted(TINY))
def test_prompts_without_pictures(name):
    model = build(name)
    prompts = [make(TINY[name], [0, 0], [7, 11], only=i).inputs for i in range(2)]
    expected = [model.generate(**p, max_new_tokens=4, do_sample=False)[0, -4:].tolist() for p in prompts]
    worker = worker_of(model, ("random",))
    jobs = [job_of(inputs, None, None) for inputs in prompts]
    for job, _ in jobs:
        worker.submit(job)
    worker.start()
    assert [result(sent)[0] for _, sent in jobs] == expected
    worker.close()


def picture_job(model: Any, sample: int = 0, **options: Any) -> Any:
    inputs = make(TINY["llava"], IMAGES, WORDS, only=sample).inputs
    return job_of(inputs, "random", 3, visual=16, **options)


def test_a_client_that_leaves_takes_its_row_out_and_nothing_else():
    model = build("llava")
    worker = worker_of(model, ("random",))
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    stays, sent = picture_job(model, 0, max_tokens=12)
    leaves, left = picture_job(model, 2, max_tokens=12)
    seen: list[str] = []

    def leave(piece: Any) -> None:
        seen.append(piece)
        if len(seen) == 3:
            worker.cancel(leaves)
        left.put(piece)

    leaves.send = leave
    for job in (stays, leaves):
        worker.submit(job)
    worker.start()
    tokens, answer = result(sent)
    worker.close()
    hook.remove()
    assert tokens == alone(model, stays.prompt.inputs, "random", 3, 12)
    assert answer.reason == "length"
    assert len(seen) == 4  # three tokens, and how it ended
    assert seen[-1].status == 499
    assert widths == [2] * 4 + [1] * 8  # the prefill, two steps, and the one that was under way


def test_a_job_that_fails_does_not_cost_the_others_their_answers():
    model = build("llava")
    worker = worker_of(model, ("random",))
    good, sent = picture_job(model, 0)
    bad, failed = picture_job(model, 2)
    bad.prompt.inputs["pixel_values"] = torch.full_like(bad.prompt.inputs["pixel_values"], torch.nan)
    other, also = picture_job(model, 3)
    for job in (good, bad, other):
        worker.submit(job)
    worker.start()
    answers = [result(its)[0] for its in (sent, also)]
    tokens, error = result(failed)
    worker.close()  # the model is its own until then
    assert answers == [alone(model, job.prompt.inputs, "random", 3, 4) for job in (good, other)]
    assert tokens == []
    assert "NaN" in str(error)


def test_what_waits_can_be_cancelled_and_a_stopped_worker_refuses():
    model = build("llava")
    worker = worker_of(model, ("random",))
    first, sent = picture_job(model, 0)
    second, _ = picture_job(model, 2)
    worker.submit(first)
    worker.submit(second)
    assert worker.waiting == 2
    worker.cancel(second)
    assert worker.waiting == 1
    worker.close()
    assert result(sent)[1].status == 503
    with pytest.raises(GripError, match="stopping"):
        worker.submit(second)


def test_a_worker_that_is_killed_answers_all_that_it_had_taken_on():
    model = build("llava")
    worker = worker_of(model, ("random",), max_batch=2)
    jobs = [picture_job(model, sample) for sample in (0, 2, 3, 0)]
    for job, _ in jobs:
        worker.submit(job)

    def die(*_: Any) -> None:
        raise SystemExit

    hook = model.register_forward_pre_hook(die)
    worker.start()
    ends = [result(sent)[1] for _, sent in jobs]
    worker._thread.join(20)
    hook.remove()
    assert [(end.status, end.message) for end in ends] == [(503, ends[0].message)] * 4
    assert "must be restarted" in ends[0].message
    assert worker.status == "failed"
    with pytest.raises(GripError, match="must be restarted"):
        worker.submit(picture_job(model, 0)[0])


def test_a_row_that_cannot_be_sampled_costs_no_other_its_answer(monkeypatch):
    model = build("llava")
    worker = worker_of(model, ("random",))
    good, sent = picture_job(model, 0, max_tokens=6)
    bad, failed = picture_job(model, 2, temperature=1.0, max_tokens=6)
    for job in (good, bad):
        worker.submit(job)
    monkeypatch.setattr("gripvlm.serve.decoding.torch.multinomial", lambda *_, **__: 1 / 0)
    worker.start()
    assert result(sent)[0] == alone(model, good.prompt.inputs, "random", 3, 6)
    assert isinstance(result(failed)[1], ZeroDivisionError)
    worker.close()


def test_a_joint_pruner_shares_the_budget_of_each_prompt_and_of_no_two(tmp_path):
    """Prompts with one and with two pictures, and budgets of their own, in one batch."""
    model = build("llava")
    torch.manual_seed(2)
    width = model.get_input_embeddings().weight.shape[1]
    scorer = Scorer(ScorerConfig(width, width=16, blocks=1, heads=2, joint=True, rounds=2))
    torch.nn.init.normal_(scorer.score.weight)
    scorer.base = ModelFingerprint.of(model)
    scorer.save_pretrained(tmp_path)
    pruner = f"grip:scorer={tmp_path}"
    prompts = [make(TINY["llava"], IMAGES, WORDS, only=i).inputs for i in range(len(IMAGES))]
    expected, moved = [], False
    for inputs, keep in zip(prompts, KEEPS, strict=True):
        expected.append(alone(model, inputs, pruner, keep, 4))
        with gripvlm.prune(model, pruner, keep=keep, question=torch.tensor([5, 6])) as record:
            model.generate(**inputs, max_new_tokens=1)
        (images,) = record.selections
        moved |= len({selection.k for selection in images}) > 1
        assert sum(selection.k for selection in images) == sum(Budget(keep).count(each.n) for each in images)
    assert moved  # from one picture to the other
    worker = worker_of(model, (pruner,))
    jobs = [job_of(inputs, pruner, keep) for inputs, keep in zip(prompts, KEEPS, strict=True)]
    for job, _ in jobs:
        worker.submit(job)
    worker.start()
    got = [result(sent) for _, sent in jobs]
    worker.close()
    assert [tokens for tokens, _ in got] == expected
    assert [answer.keep for _, answer in got] == [Budget(keep) for keep in KEEPS]


def test_a_seed_draws_the_same_in_any_batch():
    model = build("llava")

    def drawn(*others: int) -> list[int]:
        worker = worker_of(model, ("random",))
        job, sent = picture_job(model, 0, temperature=1.5, top_p=0.9, seed=7)
        for sample in others:
            worker.submit(picture_job(model, sample)[0])
        worker.submit(job)
        worker.start()
        tokens = result(sent)[0]
        worker.close()
        return tokens

    assert drawn() == drawn(2, 3)
    greedy = alone(model, make(TINY["llava"], IMAGES, WORDS, only=0).inputs, "random", 3, 4)
    assert drawn() != greedy


def test_a_second_question_does_not_run_the_vision_tower():
    model = build("llava")
    worker = worker_of(model, ("random", "norm"))
    jobs = [picture_job(model, 0) for _ in range(3)]
    jobs[2][0].prompt.__dict__["pruner"] = "norm"
    for job, _ in jobs:
        worker.submit(job)
    worker.start()
    for _, sent in jobs:
        assert isinstance(result(sent)[1], Answer)
    worker.close()
    assert (worker.encodings.hits, worker.encodings.misses) == (2, 1)


def test_a_pruner_that_merges_in_the_tower_is_refused_at_the_start():
    with pytest.raises(GripError, match=r"works inside the vision tower.*use a pruner"):
        worker_of(build("llava"), ("tome",))
