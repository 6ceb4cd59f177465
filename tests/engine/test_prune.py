"""`prune` and `prune_inputs` as users meet them: the block, the record, the question, the errors."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import gripvlm
from gripvlm.errors import BudgetError, GripError, InputError
from gripvlm.pruners import ScorePruner
from gripvlm.types import VisualTokens
from tiny_models import BOS, EOS, IMAGE, PAD, SHORT, llava_inputs, tiny_llava

# --- 7: the block leaves nothing behind -------------------------------------------------------------


def test_the_model_is_as_before(model, inputs):
    before = dict(vars(model))
    plain = model.generate(**inputs, **SHORT)
    with gripvlm.prune(model, "norm", keep=3):
        pruned = model.generate(**inputs, **SHORT)
    assert vars(model) == before
    assert torch.equal(model.generate(**inputs, **SHORT), plain)
    assert not torch.equal(pruned, plain)


def test_also_after_an_exception(model, inputs):
    before = dict(vars(model))
    with pytest.raises(KeyError), gripvlm.prune(model, "norm", keep=3):
        raise KeyError
    assert vars(model) == before
    with pytest.raises(BudgetError), gripvlm.prune(model, "norm", keep=999):
        model.generate(**inputs, **SHORT)
    assert vars(model) == before


def test_an_error_in_one_call_does_not_end_the_block(model, inputs):
    with gripvlm.prune(model, "norm", keep=3) as record:
        with pytest.raises(InputError):
            model.generate(**(inputs | {"pixel_values": inputs["pixel_values"][:2]}), **SHORT)
        assert record.calls == 0
        model.generate(**inputs, **SHORT)
    assert record.calls == 1


def test_a_wrapper_that_was_there_before_comes_back(model, inputs):
    calls = []
    plain = model.generate

    def counting(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return plain(*args, **kwargs)

    model.generate = counting
    try:
        with gripvlm.prune(model, "norm", keep=3):
            model.generate(**inputs, **SHORT)
        assert model.generate is counting
        assert calls == [inputs["input_ids"].shape[1] - 26]
    finally:
        del model.generate


def test_nested_blocks_are_refused_and_the_outer_goes_on(model, inputs):
    with gripvlm.prune(model, "norm", keep=3) as record:
        with pytest.raises(GripError, match=r"already inside a gripvlm.prune block"), gripvlm.prune(model, "grid", 4):
            pytest.fail("the inner block opened")
        model.generate(**inputs, **SHORT)
    assert [[s.k for s in sample] for sample in record.selections] == [[3], [3, 3]]


def test_two_models_in_two_threads(inputs):
    """Each has its own block and record, at the same time."""
    models = [tiny_llava(seed=seed) for seed in (1, 2)]
    expected, barrier, got = [], threading.Barrier(2), {}
    for model, keep in zip(models, (3, 7), strict=True):
        with gripvlm.prune(model, "norm", keep=keep):
            expected.append(model.generate(**inputs, **SHORT))

    def work(index: int, keep: int) -> None:
        with gripvlm.prune(models[index], "norm", keep=keep) as record:
            barrier.wait(timeout=20)
            got[index] = (models[index].generate(**inputs, **SHORT), record.kept)
            barrier.wait(timeout=20)

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, 3), (1, 7))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i][0], expected[i]) for i in range(2))
    assert (got[0][1], got[1][1]) == (9, 21)


def test_another_model_is_untouched(model, inputs):
    other = tiny_llava(seed=3)
    plain = other.generate(**inputs, **SHORT)
    with gripvlm.prune(model, "norm", keep=3):
        assert torch.equal(other.generate(**inputs, **SHORT), plain)


# --- what generate returns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 3}],
    ids=str,
)
def test_the_original_prompt_is_in_front(model, inputs, options):
    options = {"do_sample": False, "max_new_tokens": 4} | options
    rows = options.get("num_return_sequences", 1)
    prompt = inputs["input_ids"].repeat_interleave(rows, dim=0)
    with gripvlm.prune(model, "norm", keep=3):
        plain = model.generate(**inputs, **options)
        output = model.generate(**inputs, **options, return_dict_in_generate=True)
    for sequences in (plain, output.sequences, output["sequences"]):
        assert torch.equal(sequences[:, : prompt.shape[1]], prompt)
        assert sequences.shape == (2 * rows, prompt.shape[1] + 4)
        assert not (sequences[:, -4:] == IMAGE).any()


def test_lengths_count_the_callers_prompt(model, inputs):
    length = inputs["input_ids"].shape[1]
    config = GenerationConfig(max_length=length + 5, do_sample=False, suppress_tokens=[IMAGE], pad_token_id=PAD)
    with gripvlm.prune(model, "norm", keep=3):
        by_keyword = model.generate(**inputs, max_length=length + 5, do_sample=False)
        by_config = model.generate(**inputs, generation_config=config)
        positional = model.generate(inputs["input_ids"], config, pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="max_length"):
            model.generate(**inputs, max_length=length)
        shortest = model.generate(**inputs, max_length=length + 5, min_length=length + 3, do_sample=False)
    assert {out.shape[1] for out in (by_keyword, by_config, positional, shortest)} == {length + 5}
    assert config.max_length == length + 5


def test_min_length_counts_the_callers_prompt(model, inputs):
    """With the end token forced on it, the model stops as soon as min_length lets it."""
    length = inputs["input_ids"].shape[1]
    ends = {"eos_token_id": EOS, "sequence_bias": [[[EOS], 1e4]], "suppress_tokens": [IMAGE], "do_sample": False}
    with gripvlm.prune(model, "norm", keep=3):
        stopped = model.generate(**inputs, **ends, min_length=length + 3, max_new_tokens=9)
    assert stopped.shape[1] == length + 4


def test_the_record_is_of_the_latest_call(model, inputs):
    with gripvlm.prune(model, "norm", keep=0.5) as record:
        assert (record.calls, record.selections, record.kept) == (0, [], 0)
        model.generate(**inputs, **SHORT)
        assert (record.calls, record.kept, record.total) == (1, 24, 48)
        model.generate(**llava_inputs([1], [4]), **SHORT)
    assert (record.calls, record.kept, record.total) == (2, 8, 16)
    assert set(record.seconds) == {"vision", "pruner", "overhead"}
    assert all(seconds > 0 for seconds in record.seconds.values())


def test_a_call_without_images_passes_through(model):
    text = llava_inputs([0], [6])
    plain = model.generate(**text, **SHORT)
    with gripvlm.prune(model, "norm", keep=3) as record:
        assert torch.equal(model.generate(**text, **SHORT), plain)
    assert (record.calls, record.selections) == (1, [[]])


def test_keep_all_needs_no_budget_and_refuses_a_smaller_one(model, inputs):
    assert gripvlm.prune_inputs(model, inputs, "keep_all")["input_ids"].shape == inputs["input_ids"].shape
    with pytest.raises(BudgetError, match=r"'keep_all' keeps every visual token, so a budget of 4 of 16 cannot be met"):
        gripvlm.prune_inputs(model, inputs, "keep_all", keep=4)
    assert gripvlm.visual_tokens(model, inputs, keep=0.25)[0][0].keep == 4


# --- the question -----------------------------------------------------------------------------------


def test_generate_builds_no_graph_and_prune_inputs_follows_the_caller(model, inputs):
    graphs = []

    class Watch(Spy):
        def score(self, tokens: VisualTokens) -> Tensor:
            graphs.append(tokens.features.requires_grad)
            return super().score(tokens)

    with gripvlm.prune(model, Watch([]), keep=3):
        model.generate(**inputs, **SHORT)
    assert graphs == [False] * 3
    gripvlm.prune_inputs(model, inputs, Watch([]), keep=3)
    assert graphs[3:] == [True] * 3


@dataclass(frozen=True)
class Spy(ScorePruner):
    """Notes what it sees."""

    seen: list
    name: ClassVar[str] = "spy"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "grid", "question", "key"})

    def score(self, tokens: VisualTokens) -> Tensor:
        self.seen.append(tokens)
        return torch.arange(tokens.n).float()


def spied(model, inputs, **options) -> list[VisualTokens]:
    spy = Spy([])
    gripvlm.prune_inputs(model, inputs, spy, keep=3, **options)
    return spy.seen


def test_a_pruner_sees_each_image_and_the_prompts_own_text(model, inputs):
    seen = spied(model, inputs)
    table = model.get_input_embeddings()
    assert [(t.sample, t.image, t.keep, t.n, t.grid) for t in seen] == [
        (sample, image, 3, 16, (4, 4)) for sample, image in ((0, 0), (1, 0), (1, 1))
    ]
    for tokens in seen:
        row = inputs["input_ids"][tokens.sample]
        words = row[~torch.isin(row, torch.tensor([PAD, BOS, EOS, IMAGE]))]
        assert words.numel() == (7, 9)[tokens.sample]
        assert tokens.question is not None
        assert torch.equal(tokens.question, table(words))
    assert len({t.key for t in seen}) == 3
    shown = gripvlm.visual_tokens(model, inputs, keep=3)
    assert [t.key for sample in shown for t in sample] == [t.key for t in seen]
    assert all(torch.equal(a.question, b.question) for a, b in zip(chain(*shown), seen, strict=True))


def test_keys_come_from_the_pixels_alone(model, inputs):
    first = spied(model, inputs)[0].key
    assert spied(model, llava_inputs([1], [4]) | {"pixel_values": inputs["pixel_values"][:1]})[0].key == first
    assert spied(tiny_llava(seed=4), inputs)[0].key == first


def test_nobody_pays_for_a_question_that_is_not_needed(model, inputs):
    class Blind(Spy):
        needs: ClassVar[frozenset[str]] = frozenset({"features"})

    blind = Blind([])
    gripvlm.prune_inputs(model, inputs, blind, keep=3)
    assert all(tokens.question is None for tokens in blind.seen)


ASKED: list[Callable] = [
    lambda table: [[5, 6, 7], [8]],
    lambda table: [torch.tensor([5, 6, 7]), torch.tensor([8])],
    lambda table: torch.tensor([[5, 6, 7], [8, -100, -100]]),
    lambda table: [table(torch.tensor([5, 6, 7])), table(torch.tensor([8]))],
]


@pytest.mark.parametrize("form", ASKED)
def test_the_callers_question_in_every_form(model, inputs, form):
    table = model.get_input_embeddings()
    seen = spied(model, inputs, question=form(table))
    for tokens, ids in zip(seen, ([5, 6, 7], [8], [8]), strict=True):
        assert torch.equal(tokens.question, table(torch.tensor(ids)))


def test_a_single_question_and_an_empty_one(model):
    one = llava_inputs([2], [7])
    table = model.get_input_embeddings()
    for question in ([5, 6], torch.tensor([5, 6]), table(torch.tensor([5, 6])), torch.tensor([[5, 6]])):
        assert all(torch.equal(t.question, table(torch.tensor([5, 6]))) for t in spied(model, one, question=question))
    assert all(t.question.shape == (0, 48) for t in spied(model, one, question=[[]]))


def test_a_record_prints_as_one_line(model, inputs):
    with gripvlm.prune(model, "norm", keep=[[3], [4, 5]]) as record:
        assert str(record) == "nothing pruned yet"
        model.generate(**inputs, **SHORT)
    assert re.fullmatch(
        r"12 of 48 visual tokens kept \(25 %\), vision [\d.]+ ms, pruner [\d.]+ ms, overhead [\d.]+ ms", str(record)
    )
    assert repr(record) == "Record(calls=1, kept=12, total=48)"
    assert repr(record.selections) == "[[Selection(3 of 16 rows)], [Selection(4 of 16 rows), Selection(5 of 16 rows)]]"
    with gripvlm.prune(model, "fastv", keep=12) as record:
        model.generate(**inputs, **SHORT)
    assert str(record).startswith("36 of 48 visual tokens kept (75 %)")
    assert "tensor" not in f"{record!r} {record.selections}"
