"""What goes on inside a `prune` block is pruned or says that it is not; callbacks see the caller's own prompt."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import accelerate
import pytest
import torch
from transformers import DynamicCache
from transformers.generation import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor

import gripvlm
from gripvlm.errors import GripError, InputError
from gripvlm.models.compat import cache_argument, cache_of
from tiny_families import TINY, build, make
from tiny_families.base import IMAGE
from tiny_families.reference import masked


class Seen:
    """Every sort of callback; notes the ids that it was shown."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor | None] = []

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids.clone())
        return scores

    def stop(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids.clone())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def allow(self, row, ids):
        self.shown.append(ids.clone()[None])
        return list(range(20, 40))

    def put(self, value):
        self.shown.append(value)

    def end(self):
        self.shown.append(None)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=str)
def test_callbacks_see_the_full_prompt(options):
    model, inputs = build("llava"), make(TINY["llava"], [1, 1], [7, 9]).inputs
    prompt, seen = inputs["input_ids"], [Seen(), Seen(), Seen()]
    with gripvlm.prune(model, "random", keep=5):
        model.generate(
            **inputs,
            max_new_tokens=3,
            logits_processor=[seen[0]],
            stopping_criteria=[seen[1].stop],
            prefix_allowed_tokens_fn=seen[2].allow,
            **options,
        )
    for one in seen[:2]:
        assert len(one.shown) == 3
        for step, ids in enumerate(one.shown, start=int(one is seen[1])):
            assert torch.equal(ids[:, : prompt.shape[1]], prompt.repeat_interleave(len(ids) // 2, 0))
            assert ids.shape[1] == prompt.shape[1] + step
    repeated = prompt.repeat_interleave(2 if options else 1, 0)
    rows = [ids[0, : prompt.shape[1]].tolist() for ids in seen[2].shown]
    assert rows == repeated.tolist() * 3


def test_streamers_are_put_the_full_prompt():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    seen = Seen()
    with gripvlm.prune(model, "random", keep=5):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, streamer=seen)
    assert torch.equal(seen.shown[0], inputs["input_ids"])
    assert [tuple(value.shape) for value in seen.shown[1:-1]] == [(1,), (1,)]
    assert seen.shown[-1] is None


@pytest.mark.parametrize("pruner", ["random", "fastv"])
def test_criteria_that_count_tokens_count_the_callers(pruner):
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    length = inputs["input_ids"].shape[1]

    def after_three(ids, scores, **_):
        return torch.full((ids.shape[0],), ids[:, length:].shape[1] >= 3)

    for criterion in (after_three, MaxLengthCriteria(length + 3)):
        with gripvlm.prune(model, pruner, keep=0.75):
            said = model.generate(**inputs, max_new_tokens=10, do_sample=False, stopping_criteria=[criterion])
        assert said.shape[1] == length + 3


def test_a_prompt_that_ends_in_its_image_goes_on_after_it():
    """Its first 4 of 16 rows are kept: later tokens are where those of the full prompt are."""
    model, whole = build("llava"), make(TINY["llava"], [1], [1]).inputs
    ids = torch.cat((torch.tensor([[1, 20]]), torch.full((1, 16), IMAGE)), -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": whole["pixel_values"]}

    for cached in (True, False):
        noted = []
        with gripvlm.prune(model, First(), keep=4):
            hook = model.get_decoder().register_forward_pre_hook(
                lambda module, args, kwargs, noted=noted: noted.append(kwargs["position_ids"]), with_kwargs=True
            )
            model.generate(**inputs, use_cache=cached, max_new_tokens=3, do_sample=False)
            hook.remove()
        assert [int(places[0, -1]) for places in noted] == [5, 18, 19]


class First(gripvlm.Pruner):
    """Keeps the first rows."""

    name = "first"

    def select(self, tokens):
        return gripvlm.Selection(torch.arange(tokens.keep), tokens.n)


def test_a_decoding_loop_of_the_callers_own_returns_what_it_likes():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs

    def loop(model, input_ids, **kwargs):
        return ["anything", input_ids.shape[1]]

    with gripvlm.prune(model, "random", keep=5):
        found = model.generate(**inputs, custom_generate=loop, max_new_tokens=2)
    assert found == ["anything", inputs["input_ids"].shape[1] - 11]


def test_training_in_the_block_is_training_on_the_masked_model():
    model, inputs = build("llava"), make(TINY["llava"], [1, 2], [7, 9]).inputs
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    after = torch.nn.functional.pad(inputs["input_ids"] == IMAGE, (1, -1))  # who says these is dropped in one run only
    labels = labels.masked_fill(after, -100)
    with gripvlm.prune(model, "random", keep=5) as record:
        loss = model(**inputs, labels=labels).loss
    ours = torch.autograd.grad(loss, model.lm_head.weight)[0]
    expected = model(**masked(model, inputs, record.selections), labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=2e-5, rtol=0)
    theirs = torch.autograd.grad(expected, model.lm_head.weight)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    with gripvlm.prune(model, "fastv", keep=0.75), pytest.raises(InputError, match="labels"):
        model(**inputs, labels=labels)


def test_calls_that_would_run_unpruned_are_refused():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    short = gripvlm.prune_inputs(model, inputs, "random", keep=5)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    with gripvlm.prune(model, "random", keep=5):
        for arguments in (short, embedded):
            with pytest.raises(InputError, match="would run unpruned"):
                model(**arguments)
            with pytest.raises(InputError, match="would run unpruned"):
                model.generate(**arguments, max_new_tokens=1)
        with pytest.raises(InputError, match="no pixels"):
            model(input_ids=inputs["input_ids"])
        with pytest.raises(InputError, match=r"model.generate\(\*\*inputs\)"):
            model.generate(inputs)
    with gripvlm.prune(model, "fastv", keep=0.75), pytest.raises(InputError, match="guidance_scale"):
        model.generate(**inputs, guidance_scale=2.0, max_new_tokens=1)


def test_arguments_by_position_are_read_like_those_by_name():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, "random", keep=5) as record, torch.no_grad():
        by_name = model(**inputs).logits
        by_place = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
        assert record.kept == 5
    assert torch.equal(by_name, by_place)


def test_a_block_that_was_not_entered_says_so(caplog):
    model = build("llava")
    with pytest.raises(AttributeError, match="is a block and has no 'generate'"):
        gripvlm.prune(model, "random", keep=5).generate(1)
    assert not hasattr(gripvlm.prune(model, "random", keep=5), "_repr_html_")
    with caplog.at_level("WARNING", "gripvlm"):
        gripvlm.prune(model, "random", keep=5)
    assert "was called but not entered" in caplog.text


def test_copies_made_in_a_block_are_themselves():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with gripvlm.prune(model, "random", keep=2) as record:
        copies = [copy.deepcopy(model)]
        if not any(layer._forward_hooks for layer in model.modules()):  # transformers leaves some that are not pickled
            copies.append(pickle.loads(pickle.dumps(model)))
        for copied in copies:
            assert torch.equal(copied.generate(**inputs, max_new_tokens=3, do_sample=False), plain)
        assert record.calls == 0
        with torch.no_grad():
            copies[0].lm_head.weight.zero_()
            assert not copies[0](**inputs).logits.any()
            assert model(**inputs).logits.any()
    assert not {"generate", "forward"} & vars(model).keys()


def test_blocks_of_several_threads():
    """Each thread has its own block; one without is served by the only block there is, and refused among several."""
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    counts, inside, leave = {}, threading.Barrier(3), threading.Barrier(3)

    def ask(keep):
        with gripvlm.prune(model, "random", keep=keep) as record:
            inside.wait()
            for _ in range(3):
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
            counts[keep] = record.kept, record.calls
            leave.wait()

    threads = [threading.Thread(target=ask, args=(keep,)) for keep in (2, 7)]
    for thread in threads:
        thread.start()
    inside.wait()
    with pytest.raises(GripError, match=r"2 gripvlm\.prune blocks are open for this model in other threads"):
        model.generate(**inputs, max_new_tokens=2)
    leave.wait()
    for thread in threads:
        thread.join()
    assert counts == {2: (2, 3), 7: (7, 3)}
    with gripvlm.prune(model, "random", keep=3) as record:
        thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 1})
        thread.start()
        thread.join()
        assert (record.kept, record.calls) == (3, 1)


def wrapped(kind: str, model):
    """The model as a user may have it, and what takes that off again."""
    if kind == "peft":
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    return accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("spec", ["norm", "fastv"])
@pytest.mark.parametrize("kind", ["peft", "compiled", "offloaded"])
def test_wrapped_models_are_pruned_by_generate_and_by_forward(kind, spec):
    """As the functional form does it, for the same wrapper."""
    inputs = make(TINY["llava"], [1], [7]).inputs
    model = wrapped(kind, copy.deepcopy(build("llava")))
    with gripvlm.pruned_run(model, inputs, spec, 0.75) as (short, _), torch.no_grad():
        logits = model(**short).logits
    with gripvlm.prune(model, spec, 0.75) as record, torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = torch.cat((ids.sequences, torch.tensor([[11, 12]])), -1)
        cache = {cache_argument(build("llava")): cache_of(ids)}
        assert model.generate(input_ids=more, **cache, max_new_tokens=2).shape[1] == more.shape[1] + 2
        assert record.calls == 3
    with gripvlm.pruned_run(model, inputs, spec, 0.75) as (short, _):
        expected = model.generate(**short, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids.sequences[:, -3:], expected[:, -3:])


def test_an_unpruned_chat_goes_on_after_a_block():
    """M-RoPE models note by how much positions run ahead: a pruned prompt between two turns must not change that."""
    model, inputs = build("qwen2_5_vl"), make(TINY["qwen2_5_vl"], [1], [7]).inputs
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    said = []
    for pruned in (False, True):
        first = model.generate(**inputs, **options)
        if pruned:
            with gripvlm.prune(model, "random", keep=3), torch.no_grad():
                model.generate(**inputs, max_new_tokens=2)
                model(**inputs)
        ids = torch.cat((first.sequences, torch.tensor([[11, 12]])), -1)
        said.append(model.generate(input_ids=ids, **{cache_argument(model): cache_of(first)}, **options).sequences)
    assert torch.equal(*said)


def test_two_threads_that_open_blocks_at_once():
    """Between reading who is there and putting oneself there, another may come."""
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    interval, kept = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(25):
            start = threading.Barrier(2)

            def ask(keep, start=start):
                start.wait()
                with gripvlm.prune(model, "random", keep=keep) as record:
                    model.generate(**inputs, max_new_tokens=1)
                kept.append((keep, record.kept, record.calls))

            threads = [threading.Thread(target=ask, args=(keep,)) for keep in (2, 7)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(kept) == [(2, 2, 1)] * 25 + [(7, 7, 1)] * 25
    assert not {"generate", "forward"} & vars(model).keys()


@pytest.mark.parametrize("pruner", ["random", "fastv"])
def test_a_cache_of_an_interrupted_call_is_gone_on_from(pruner):
    """Ctrl-C in a streamer; what was said by then is the caller's to pass."""
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    said = []

    class Stops(Seen):
        def put(self, value):
            said.append(value)
            if len(said) == 3:
                raise KeyboardInterrupt

    cache = {cache_argument(model): DynamicCache(config=model.config.get_text_config())}
    options = {"max_new_tokens": 4, "do_sample": False}
    with gripvlm.prune(model, pruner, keep=0.75):
        whole = model.generate(**inputs, **options)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **cache, streamer=Stops(), **options)
        ids = torch.cat((inputs["input_ids"], said[1][None], said[2][None]), -1)
        rest = model.generate(input_ids=ids, **cache, max_new_tokens=2, do_sample=False)
    assert torch.equal(rest, whole)
    with pytest.raises(InputError, match=r"use it inside `with gripvlm\.prune"):
        model.generate(input_ids=torch.cat((rest, said[1][None]), -1), **cache, max_new_tokens=1)


def test_a_cache_in_a_tuple_is_known_too():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    step, name = torch.tensor([[11]]), cache_argument(model)
    with gripvlm.prune(model, "random", keep=5), torch.no_grad():
        output = model(**inputs, use_cache=True, return_dict=False)
        expected = model(**inputs, use_cache=True)
        (cache,) = (part for part in output if hasattr(part, "get_seq_length"))
        ours = model(input_ids=step, **{name: cache}).logits
        assert torch.equal(ours, model(input_ids=step, **{name: cache_of(expected)}).logits)


def test_a_processor_of_transformers_takes_the_place_of_the_models_own():
    """As it does outside: two penalties are not both applied, and what it counts is the caller's prompt."""
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 3, "do_sample": False, "repetition_penalty": 1.5}
    mine = [RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=length)]
    plain = model.generate(**inputs, **options, logits_processor=mine, output_scores=True, return_dict_in_generate=True)
    for spec, keep in (("keep_all", None), ("random", 5)):
        with gripvlm.prune(model, spec, keep) as record:
            ours = model.generate(
                **inputs, **options, logits_processor=mine, output_scores=True, return_dict_in_generate=True
            )
        hidden = masked(model, inputs, record.selections)
        theirs = model.generate(
            **hidden, **options, logits_processor=mine, output_scores=True, return_dict_in_generate=True
        )
        torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-4, rtol=1e-5)
        if spec == "keep_all":
            assert all(torch.equal(a, b) for a, b in zip(ours.scores, plain.scores, strict=True))
    assert mine[0].prompt_ignore_length == length


def test_a_cache_of_an_untouched_prompt_is_anybodys():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, "keep_all"):
        output = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat((output.sequences, torch.tensor([[11]])), -1)
    model.generate(input_ids=ids, **{cache_argument(model): cache_of(output)}, max_new_tokens=1)


def test_other_calls_that_are_refused():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    other, name = make(TINY["llava"], [2], [7]).inputs, cache_argument(model)
    with gripvlm.prune(model, "random", keep=5):
        with pytest.raises(InputError, match="logits_to_keep as a tensor"):
            model(**inputs, logits_to_keep=torch.tensor([18]))
        with pytest.raises(InputError, match="token ids twice"):
            model.generate(inputs["input_ids"], **inputs)
        with pytest.raises(InputError, match="no pixels"):
            model.generate(input_ids=inputs["input_ids"], **{name: DynamicCache(config=model.config.get_text_config())})
    with gripvlm.pruned_run(model, inputs, "fastv", keep=0.75) as (short, _), torch.no_grad():
        model(**short)
        for given in (other, {"input_ids": torch.tensor([[11, 12, 13]])}):
            with pytest.raises(InputError, match="open a block for each prompt"):
                model(**given)
    with pytest.raises(InputError, match="question is a int"):
        gripvlm.prune_inputs(model, inputs, "cdpruner", 5, question=5)
