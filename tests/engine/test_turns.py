"""Further turns on a pruned cache, by `generate` and by `forward`, equal the masked model's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_llm_drop import masking
from test_llm_stage import stages_of
from transformers import DynamicCache

import gripvlm
from gripvlm.errors import InputError
from gripvlm.models import FAMILIES
from gripvlm.models.compat import cache_argument, cache_of
from tiny_families import TINY, build, make
from tiny_families.base import IMAGE
from tiny_families.reference import full_positions, masked, teacher_forced

MASKING = [name for name in TINY if FAMILIES[name].equals == "masking"]
ANSWER = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
SAID = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[15, 16]])]


def conversation(model, inputs, positions=None):
    """Three turns, each given the whole conversation's ids.

    Args:
        positions: of the prompt, for the reference, whose mask does not count what it hides.

    Returns:
        The logits of the answers [9, B, V], and the ids of the whole.
    """

    def following(length: int) -> dict:
        if positions is None:
            return {}
        after = positions[..., -1:] + 1 + torch.arange(length - positions.shape[-1])
        return {"position_ids": torch.cat((positions, after), -1)}

    output, mask, batch = model.generate(**inputs, **ANSWER), inputs["attention_mask"], len(inputs["input_ids"])
    logits = list(output.logits)
    for said in SAID:
        ids = torch.cat((output.sequences, said.expand(batch, -1)), -1)
        mask = torch.cat((mask, mask.new_ones(batch, ids.shape[1] - mask.shape[1])), -1)
        cache = {cache_argument(model): cache_of(output)}
        output = model.generate(input_ids=ids, attention_mask=mask, **cache, **following(ids.shape[1]), **ANSWER)
        logits += output.logits
    return torch.stack(logits), output.sequences


def precise(name: str, images: list[int], words: list[int], attention: str = "sdpa"):
    """In float64, where rounding cannot hide a mistake; experts and eager attention's softmax know float32 only."""
    experts = any(part == "experts" for path, _ in build(name).named_modules() for part in path.split("."))
    kind = torch.float32 if experts or attention == "eager" else torch.float64
    inputs = make(TINY[name], images, words).inputs
    inputs = {key: value.to(kind) if value.is_floating_point() else value for key, value in inputs.items()}
    return copy.deepcopy(build(name, attention)).to(kind), inputs


def close(model, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same log-probabilities of the tokens that may be said: 1e-6 in float64, more in float32."""
    allowed = torch.ones(ours.shape[-1], dtype=torch.bool)
    allowed[model.generation_config.suppress_tokens or []] = False
    ours, theirs = (logits.float()[..., allowed].log_softmax(-1) for logits in (ours, theirs))
    # Linear attention: prompts in chunks, answers by recurrence, both in float32.
    linear = "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    bound = 1e-6 if model.dtype == torch.float64 and not linear else TINY[model.config.model_type].tolerance
    assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("pruner", ["random", "divprune", "norm"])
@pytest.mark.parametrize("name", MASKING)
def test_three_turns_equal_the_masked_model(name, pruner):
    model, inputs = precise(name, [1, 2], [7, 9])
    with gripvlm.prune(model, pruner, keep=5) as record:
        logits, ids = conversation(model, inputs)
        assert record.calls == 3
    assert record.kept < record.total
    expected, theirs = conversation(model, masked(model, inputs, record.selections), full_positions(model, inputs))
    assert torch.equal(ids, theirs)
    close(model, logits, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in MASKING if FAMILIES[name].layers])
def test_three_turns_of_a_pruner_inside_the_language_model(name, attention):
    """The reference is the full model with the masks of its later layers changed, which never saw the library."""
    model, inputs = precise(name, [1, 2], [7, 9], attention)
    with gripvlm.prune(model, "fastv", keep=0.75) as record:
        logits, ids = conversation(model, inputs)
    with masking(model, stages_of(inputs["input_ids"], inputs["attention_mask"], record.selections)):
        expected, theirs = conversation(model, inputs)
    assert torch.equal(ids, theirs)
    close(model, logits, expected)


@pytest.mark.parametrize("pruner", ["random", "divprune", "norm"])
@pytest.mark.parametrize("name", [name for name in TINY if name not in MASKING])
def test_three_turns_equal_the_model_that_never_saw_the_dropped_rows(name, pruner):
    model, inputs = precise(name, [1], [7])
    with gripvlm.prune(model, pruner, keep=5):
        logits, ids = conversation(model, inputs)
    short = gripvlm.prune_inputs(model, inputs, pruner, keep=5)
    expected = torch.stack(teacher_forced(model, short, ids[:, inputs["input_ids"].shape[1] :]))
    close(model, logits, expected[[0, 1, 2, 7, 8, 9, 12, 13, 14]])


def test_merged_tokens_keep_their_sizes_in_later_turns():
    """As in one run over the whole conversation."""
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, "pool", keep=4, proportional_attention=True):
        logits, ids = conversation(model, inputs)
    with gripvlm.pruned_run(model, inputs, "pool", keep=4, proportional_attention=True) as (short, _):
        expected = torch.stack(teacher_forced(model, short, ids[:, inputs["input_ids"].shape[1] :]))
    expected = expected[[0, 1, 2, 7, 8, 9, 12, 13, 14]]
    close(model, logits, expected)
    with gripvlm.prune(model, "pool", keep=4):  # without sizes it is another model
        assert (conversation(model, inputs)[0] - logits).abs().max() > 1e-3


@pytest.mark.parametrize("pruner", ["random", "fastv"])
def test_the_new_tokens_alone_with_a_mask_of_the_whole(pruner):
    model, inputs = build("qwen2_5_vl"), make(TINY["qwen2_5_vl"], [1, 2], [7, 9]).inputs
    name = cache_argument(model)
    with gripvlm.prune(model, pruner, keep=0.75):
        first = model.generate(**inputs, **ANSWER)
        spare = copy.deepcopy(cache_of(first))
        ids = torch.cat((first.sequences, SAID[0].expand(2, -1)), -1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
        whole = model.generate(input_ids=ids, attention_mask=mask, **{name: cache_of(first)}, **ANSWER)
        have = first.sequences.shape[1] - 1  # the last token that was decoded is not in the cache
        part = model.generate(input_ids=ids[:, have:], attention_mask=mask, **{name: spare}, **ANSWER)
    assert torch.equal(part.sequences, whole.sequences[:, have:])
    close(model, torch.stack(part.logits), torch.stack(whole.logits))


@pytest.mark.parametrize("pruner", ["random", "fastv"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_forward_in_the_block_prunes_and_goes_on(name, pruner):
    """A loop of the caller's own, which passes the full prompt, then one token at a time, says what generate says."""
    model, inputs = build(name), make(TINY[name], [1, 2], [7, 9]).inputs
    with gripvlm.prune(model, pruner, keep=0.75) as record, torch.no_grad():
        expected = model.generate(**inputs, **ANSWER)
        selections = record.selections
        output, said = model(**inputs, use_cache=True), []
        cache = cache_of(output)
        for _ in range(3):
            scores = output.logits[:, -1]
            scores[:, model.generation_config.suppress_tokens] = -torch.inf
            said.append(scores.argmax(-1, keepdim=True))
            output = model(input_ids=said[-1], **{cache_argument(model): cache})
        assert record.calls == 1 + 1 + 3
    for mine, theirs in zip(record.selections, selections, strict=True):
        assert [s.indices.tolist() for s in mine] == [s.indices.tolist() for s in theirs]
    assert torch.equal(torch.cat(said, -1), expected.sequences[:, -3:])


def test_outside_a_block_a_pruned_cache_says_what_to_do():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    name = cache_argument(model)
    with gripvlm.prune(model, "random", keep=5):
        first = model.generate(**inputs, **ANSWER)
    ids = torch.cat((first.sequences, SAID[0]), -1)
    for cache in (cache_of(first), copy.deepcopy(cache_of(first)), pickle.loads(pickle.dumps(cache_of(first)))):
        with pytest.raises(InputError, match=r"holds 5 of a prompt's 16 visual tokens.*gripvlm\.prune"):
            model.generate(input_ids=ids, **{name: cache}, **ANSWER)
    with gripvlm.prune(model, "norm", keep=2):  # any block for the model serves
        second = model.generate(input_ids=ids, **{name: cache_of(first)}, **ANSWER)
    assert second.sequences.shape[1] == ids.shape[1] + 3
    cache_of(second).reset()
    model.generate(**inputs, **{name: cache_of(second)}, **ANSWER)  # empty, it is anybody's


WRONG = [
    (lambda ids: ids[:, :-5], "already covers"),
    (lambda ids: ids.index_fill(1, torch.tensor([2]), 7), "token 2 of sample 0 is 7"),
    (lambda ids: ids.expand(3, -1), "holds 1 prompts, but input_ids have 3"),
    (lambda ids: ids.index_fill(1, torch.tensor([ids.shape[1] - 2]), IMAGE), "a further picture on a pruned cache"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_no_continuation_is_refused(change, says):
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, "random", keep=5):
        first = model.generate(**inputs, **ANSWER)
        ids = change(torch.cat((first.sequences, SAID[0]), -1))
        with pytest.raises(InputError, match=says):
            model.generate(input_ids=ids, **{cache_argument(model): cache_of(first)}, **ANSWER)


def test_pixels_of_pictures_in_the_cache_may_come_again():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, "random", keep=5):
        first = model.generate(**inputs, **ANSWER)
        ids = torch.cat((first.sequences, SAID[0]), -1)
        again = {"pixel_values": inputs["pixel_values"], cache_argument(model): cache_of(first)}
        assert model.generate(input_ids=ids, **again, **ANSWER).sequences.shape[1] == ids.shape[1] + 3


def test_rows_of_a_cache_are_picked_and_repeated():
    model, inputs = build("llava"), make(TINY["llava"], [1, 2], [7, 9]).inputs
    name = cache_argument(model)
    with gripvlm.prune(model, "fastv", keep=0.75):
        first = model.generate(**inputs, **ANSWER)
        ids = torch.cat((first.sequences, SAID[0].expand(2, -1)), -1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
        both = copy.deepcopy(cache_of(first))
        expected = model.generate(input_ids=ids, attention_mask=mask, **{name: both}, **ANSWER)
        cache = cache_of(first)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        ids, mask = ids[[1, 1]], mask[[1, 1]]
        found = model.generate(input_ids=ids, attention_mask=mask, **{name: cache}, **ANSWER)
    assert torch.equal(found.sequences, expected.sequences[[1, 1]])


def test_a_cache_after_beams_is_refused():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    cache = DynamicCache(config=model.config.get_text_config())
    with gripvlm.prune(model, "random", keep=5):
        output = model.generate(**inputs, **{cache_argument(model): cache}, num_beams=2, **ANSWER)
        ids = torch.cat((output.sequences, SAID[0]), -1)
        with pytest.raises(InputError, match="beam search"):
            model.generate(input_ids=ids, **{cache_argument(model): cache_of(output)}, **ANSWER)
