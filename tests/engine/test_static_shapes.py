"""`pad_to_multiple_of`: few lengths, the same answers, a compiled model that is used again."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import gripvlm
from gripvlm.errors import InputError
from tiny_families import TINY, build, make
from tiny_models import IMAGE, SHORT


def inputs(words: int) -> dict:
    ids = torch.tensor([[1, *[IMAGE] * 16, *range(3, 3 + words)]] * 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("multiple", [8, 64])
def test_the_answers_are_the_same(family, multiple):
    model, batch = build(family), make(TINY[family], [1, 1], [3, 6])
    with torch.no_grad(), gripvlm.pruned_run(model, batch.inputs, "norm", 3) as (plain, _):
        expected = model(**plain, use_cache=False).logits
        said = model.generate(**plain, **SHORT)[:, plain["input_ids"].shape[1] :]
    run = gripvlm.pruned_run(model, batch.inputs, "norm", 3, pad_to_multiple_of=multiple)
    with torch.no_grad(), run as (padded, _):
        length = padded["input_ids"].shape[1]
        assert length % multiple == 0
        assert length - plain["input_ids"].shape[1] in range(multiple)
        found = model(**padded, use_cache=False).logits
        again = model.generate(**padded, **SHORT)[:, length:]
    real = plain["attention_mask"].bool()
    torch.testing.assert_close(found[padded["attention_mask"].bool()], expected[real], atol=2e-4, rtol=1e-4)
    assert torch.equal(again, said)


def test_generate_counts_the_prompt_as_the_caller_does():
    model, batch = build("llava"), inputs(5)
    length = batch["input_ids"].shape[1]
    with gripvlm.prune(model, "norm", 3):
        plain = model.generate(**batch, **SHORT)
        cut = model.generate(**batch, max_length=length + 2, do_sample=False)
    for multiple in (8, 64):  # shorter and longer than the full prompt
        with gripvlm.prune(model, "norm", 3, pad_to_multiple_of=multiple):
            assert torch.equal(model.generate(**batch, **SHORT), plain)
            assert torch.equal(model.generate(**batch, max_length=length + 2, do_sample=False), cut)


def test_padding_goes_where_it_was_and_labels_are_ignored_there():
    model, batch = build("llava"), inputs(5)
    batch["input_ids"] = torch.cat((batch["input_ids"], torch.zeros(2, 2, dtype=torch.long)), 1)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    found = gripvlm.prune_inputs(model, batch, "norm", 3, pad_to_multiple_of=16)
    assert found["attention_mask"].tolist() == [[1] * 9 + [0] * 7] * 2
    assert (found["labels"][:, 9:] == -100).all()
    assert not found["position_ids"][:, 9:].any()


def test_nothing_dropped_is_padded_too():
    found = gripvlm.prune_inputs(build("llava"), inputs(5), "keep_all", pad_to_multiple_of=32)
    assert found["attention_mask"].tolist() == [[0] * 10 + [1] * 22] * 2


def test_a_compiled_model_is_used_again():
    model = build("llava")
    frames = {}
    for multiple in (None, 16):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model.forward, backend=counter, dynamic=False)
        frames[multiple] = []
        for words in (3, 4, 6):
            run = gripvlm.pruned_run(model, inputs(words), "norm", 5, pad_to_multiple_of=multiple)
            with torch.no_grad(), run as (arguments, _):
                torch.testing.assert_close(
                    compiled(**arguments, use_cache=False).logits, model(**arguments, use_cache=False).logits
                )
            frames[multiple].append(counter.frame_count)
    torch._dynamo.reset()
    assert frames[16][0] == frames[16][1] == frames[16][2]
    assert frames[None][0] < frames[None][1] < frames[None][2]


@pytest.mark.parametrize("wrong", [0, -8, 2.5, True, "64"])
def test_what_is_no_multiple_is_refused(wrong):
    with pytest.raises(InputError, match=r"pad_to_multiple_of=.*pass an int of 1 or more, such as 64"):
        gripvlm.prune_inputs(build("llava"), inputs(3), "norm", 3, pad_to_multiple_of=wrong)
    with (
        pytest.raises(InputError, match="pad_to_multiple_of"),
        gripvlm.prune(build("llava"), "norm", 3, pad_to_multiple_of=wrong),
    ):
        pass
