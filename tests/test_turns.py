"""Further turns on a pruned cache, forwards inside the block, and whatever is shown token ids."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import MaxLengthCriteria

import gripvlm
from gripvlm.errors import GripError, InputError
from gripvlm.models import FAMILIES
from gripvlm.models.renamed import cache_argument, cache_of
from tiny_families import TINY, build, make
from tiny_families.reference import full_positions, masked

MASKING = [name for name in TINY if FAMILIES[name].equals == "masking"]
ANSWER = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TURNS = 3
SAID = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[15, 16]])]


def pruners_for(name: str) -> list[str]:
    """One that picks, one that merges, and one inside the language model or another that picks."""
    return ["random", "prumerge" if FAMILIES[name].vision else "divprune", "fastv" if FAMILIES[name].layers else "norm"]


def conversation(model, inputs, batch: int, *, cache=None):
    """The logits of each turn's answer, and the ids of the whole; each turn is the whole conversation's ids."""
    logits, options = [], {cache_argument(model): cache} if cache is not None else {}
    output = model.generate(**inputs, **options, **ANSWER)
    mask = inputs["attention_mask"]
    for turn in range(TURNS):
        logits += output.logits
        if turn == TURNS - 1:
            return torch.stack(logits), output.sequences
        ids = torch.cat((output.sequences, SAID[turn].expand(batch, -1)), -1)
        mask = torch.cat((mask, mask.new_ones(batch, ids.shape[1] - mask.shape[1])), -1)
        output = model.generate(
            input_ids=ids, attention_mask=mask, **{cache_argument(model): cache_of(output)}, **ANSWER
        )


def masked_run(model, inputs, selections, sequences) -> torch.Tensor:
    """[T, B, V] logits before each token of the full prompt and all that followed, dropped tokens masked throughout."""
    prompt = masked(model, inputs, selections)
    later = sequences[:, inputs["input_ids"].shape[1] :]
    whole = prompt | {"input_ids": sequences}
    whole["attention_mask"] = torch.cat((prompt["attention_mask"], torch.ones_like(later)), -1)
    places = full_positions(model, inputs)
    after = places[..., -1:] + 1 + torch.arange(later.shape[1])
    whole["position_ids"] = torch.cat((places, after), -1)
    if model.config.model_type == "paligemma":  # its generate counts from 1
        whole["position_ids"] = whole["position_ids"] + 1
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            whole[name] = torch.cat((inputs[name], torch.zeros_like(later)), -1)
    with torch.no_grad():
        return model(**whole).logits.transpose(0, 1)


def answered(logits: torch.Tensor, prompt: int) -> torch.Tensor:
    """The logits from which `conversation` drew its answers, among those of the whole run [T, B, V]."""
    places, at = [], prompt - 1
    for turn in range(TURNS):
        places += [at, at + 1, at + 2]
        at += 3 + (SAID[turn].shape[1] if turn < len(SAID) else 0)
    return logits[places]


def log_probabilities(model, logits: torch.Tensor) -> torch.Tensor:
    never = model.generation_config.suppress_tokens or []
    return logits.float().index_fill(-1, torch.tensor(never, dtype=torch.long), -30.0).log_softmax(-1)


@pytest.mark.parametrize("at", [0, 1], ids=["picks", "merges"])
@pytest.mark.parametrize("name", MASKING)
def test_three_turns_equal_the_masked_model(name, at):
    model, batch = build(name), make(TINY[name], [1, 1], [7, 9])
    pruner = pruners_for(name)[at]
    if pruner != "random":
        pruner = "norm" if pruner == "prumerge" else pruner  # merged rows are not a subset, so nothing masks to them
    with gripvlm.prune(model, pruner, keep=5) as record:
        logits, sequences = conversation(model, batch.inputs, 2)
        assert record.calls == TURNS
        assert record.kept == sum(s.k for sample in record.selections for s in sample) > 0
    expected = answered(masked_run(model, batch.inputs, record.selections, sequences), batch.inputs["input_ids"].shape[1])
    assert (log_probabilities(model, logits) - log_probabilities(model, expected)).abs().max() <= 2e-5
