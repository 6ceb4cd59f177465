"""What gripvlm refuses, and that the message says what to type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import gripvlm
from gripvlm.errors import BudgetError, GripError, InputError, PrunerError, UnsupportedModelError
from gripvlm.pruners import Pruner, ScorePruner
from gripvlm.types import Merge, Selection, VisualTokens
from tiny_models import IMAGE, SHORT, llava_inputs, tiny_llama, tiny_llava


@dataclass(frozen=True)
class Asks(ScorePruner):
    """Reads the question."""

    name: ClassVar[str] = "asks"
    needs: ClassVar[frozenset[str]] = frozenset({"question"})

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.zeros(tokens.n)


@dataclass(frozen=True)
class Says(Pruner):
    """Returns whatever it is told to."""

    answer: Callable
    name: ClassVar[str] = "says"

    def select(self, tokens: VisualTokens) -> Selection:
        return self.answer(tokens)


def merged(source, destination, weight) -> Callable:
    merge = Merge(torch.tensor(source), torch.tensor(destination), torch.tensor(weight))
    return lambda tokens: Selection(torch.arange(4), 16, merge=merge)


WRONG: list[tuple[Callable, str]] = [
    (lambda t: torch.arange(4), "returned a Tensor, expected a Selection"),
    (lambda t: None, "returned a NoneType"),
    (lambda t: Selection(torch.arange(3), 16), "returned 3 indices, but the budget is exactly 4 of 16"),
    (lambda t: Selection(torch.arange(5), 16), "returned 5 indices"),
    (lambda t: Selection(torch.arange(4), 15), "says n=15, but there are 16"),
    (lambda t: Selection(torch.arange(4)[None], 16), r"LongTensor \[k\], got torch.int64 \(1, 4\)"),
    (lambda t: Selection(torch.arange(4).float(), 16), "LongTensor"),
    (lambda t: Selection([0, 1, 2, 3], 16), "LongTensor"),
    (lambda t: Selection(torch.tensor([0, 1, 2, 16]), 16), r"reach 0..16, allowed 0..15"),
    (lambda t: Selection(torch.tensor([-1, 1, 2, 3]), 16), r"reach -1..3"),
    (lambda t: Selection(torch.tensor([0, 2, 2, 3]), 16), "ascending, without duplicates"),
    (lambda t: Selection(torch.tensor([3, 2, 1, 0]), 16), "ascending, without duplicates"),
    (lambda t: Selection(torch.arange(4), 16, torch.zeros(15)), r"scores must be a tensor \(16,\), got \(15,\)"),
    (lambda t: Selection(torch.arange(4), 16, [0.0] * 16), r"scores must be a tensor \(16,\), got list"),
    (lambda t: Selection(torch.arange(4), 16, torch.full((16,), torch.nan)), "16 of 16 scores are NaN"),
    (merged([0, 1], [0], [1.0]), "differ in length"),
    (merged([0, 16], [0, 1], [1.0, 1.0]), r"source leaves the rows 0..15"),
    (merged([0, 1], [0, 4], [1.0, 1.0]), r"destination leaves the kept slots 0..3"),
    (merged([0, 1], [0, 0], [0.5, 0.6]), "must sum to 1"),
    (merged([0, 1], [0, 0], [0.5, float("nan")]), "must sum to 1"),
]


@pytest.mark.parametrize(("answer", "says"), WRONG)
def test_a_pruner_that_returns_nonsense_is_named(model, inputs, answer, says):
    with pytest.raises(PrunerError, match=f"pruner 'says' on image 0 of sample 0: .*{says}"):
        gripvlm.prune_inputs(model, inputs, Says(answer), keep=4)


class Misfit(Pruner):
    name = "misfit"

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def select(self, tokens):
        return Selection(torch.arange(tokens.keep), tokens.n)


class Stranger:
    def select(self, tokens):
        return Selection(torch.arange(tokens.keep), tokens.n)


def without(inputs: dict, *names: str) -> dict:
    return {name: value for name, value in inputs.items() if name not in names}


class Cache:
    def get_seq_length(self) -> int:
        return 5


REFUSED: list[tuple[type[GripError], str, Callable]] = [
    (InputError, "no image: inputs have no pixel_values", lambda i: {"inputs": without(i, "pixel_values")}),
    (
        InputError,
        "sample 1 has 32 image placeholder tokens",
        lambda i: {"inputs": i | {"pixel_values": i["pixel_values"][:2]}},
    ),
    (
        InputError,
        "1 of 4 images have no placeholder",
        lambda i: {"inputs": i | {"pixel_values": i["pixel_values"][[0, 1, 2, 2]]}},
    ),
    (InputError, "inputs are a list", lambda i: {"inputs": [1]}),
    (InputError, r"token ids \[B, L\]", lambda i: {"inputs": without(i, "input_ids")}),
    (InputError, r"token ids \[B, L\]", lambda i: {"inputs": i | {"input_ids": i["input_ids"][0]}}),
    (InputError, "inputs_embeds hide", lambda i: {"inputs": i | {"inputs_embeds": torch.zeros(1)}}),
    (InputError, "already holds tokens", lambda i: {"inputs": i | {"past_key_values": Cache()}}),
    (
        InputError,
        r"attention_mask has shape \(2, 41\)",
        lambda i: {"inputs": i | {"attention_mask": i["attention_mask"][:, 1:]}},
    ),
    (
        InputError,
        r"attention_mask is a dict: pass a tensor like input_ids, \(2, 42\)",
        lambda i: {"inputs": i | {"attention_mask": {"full_attention": i["attention_mask"]}}},
    ),
    (InputError, "labels is a list: pass a tensor", lambda i: {"inputs": i | {"labels": i["input_ids"].tolist()}}),
    (InputError, r"labels has shape \(1, 42\)", lambda i: {"inputs": i | {"labels": i["input_ids"][:1]}}),
    (InputError, "cross_mask has one entry a prompt token", lambda i: {"inputs": i | {"cross_mask": i["input_ids"]}}),
    (InputError, "positions='new'", lambda i: {"positions": "new"}),
    (InputError, "question is text", lambda i: {"pruner": Asks(), "question": "what is it?"}),
    (InputError, "question is text", lambda i: {"pruner": Asks(), "question": ["what?", "who?"]}),
    (InputError, "1 questions for 2 prompts", lambda i: {"pruner": Asks(), "question": [[3, 4]]}),
    (InputError, "id 99 is outside the vocabulary of 99", lambda i: {"pruner": Asks(), "question": [[3], [99]]}),
    (InputError, r"expected \(t, 48\)", lambda i: {"pruner": Asks(), "question": torch.zeros(2, 3, 7)}),
    (InputError, r"expected \(t,\)", lambda i: {"pruner": Asks(), "question": torch.zeros(2, 3, 7).long()}),
    (BudgetError, "'norm' needs a budget: pass keep=64", lambda i: {"keep": None}),
    (BudgetError, "keep=17, but image 0 of sample 0 has only 16", lambda i: {"keep": 17}),
    (BudgetError, "keep=17, but image 1 of sample 1 has only 16", lambda i: {"keep": [[1], [1, 17]]}),
    (BudgetError, "3 entries for 2 samples", lambda i: {"keep": [1, 2, 3]}),
    (BudgetError, r"keep\[1\] has 1 entries for the 2 images", lambda i: {"keep": [1, [2]]}),
    (BudgetError, "did you mean the int 4", lambda i: {"keep": 4.0}),
    (BudgetError, "use a count \\(64\\)", lambda i: {"keep": "half"}),
    (PrunerError, "unknown pruner 'nrom': did you mean 'norm'", lambda i: {"pruner": "nrom"}),
    (
        PrunerError,
        r"'misfit' needs \['depth'\], but known are",
        lambda i: {"pruner": Misfit(needs=frozenset({"depth"}))},
    ),
    (PrunerError, "'misfit' states no needs", lambda i: {"pruner": Misfit(needs="features")}),
    (PrunerError, "a Stranger is no pruner: make it a subclass of gripvlm.Pruner", lambda i: {"pruner": Stranger()}),
    (PrunerError, "has no name", lambda i: {"pruner": Misfit(name=None)}),
    (
        PrunerError,
        "stage 'layer', but its base class at 'input'",
        lambda i: {"pruner": Misfit(stage="layer")},
    ),
    (UnsupportedModelError, "got a Linear: pass a transformers model", lambda i: {"model": torch.nn.Linear(2, 2)}),
]


@pytest.mark.parametrize(("error", "says", "change"), REFUSED)
def test_what_is_refused_and_what_it_says(model, inputs, error, says, change):
    arguments = {"model": model, "inputs": inputs, "pruner": "norm", "keep": 4} | change(inputs)
    with pytest.raises(error, match=says):
        gripvlm.prune_inputs(**arguments)


def test_a_block_refuses_early(model):
    """What can be known before the first call is said when the block opens."""
    for pruner, keep, options in (
        ("nrom", 4, {}),
        ("norm", None, {}),
        ("norm", 0, {}),
        ("norm", 4, {"positions": "x"}),
    ):
        with pytest.raises(GripError), gripvlm.prune(model, pruner, keep, **options):
            pytest.fail("the block opened")


def test_unsupported_models_hear_what_is_supported():
    text_only = LlamaForCausalLM(tiny_llama())
    with pytest.raises(UnsupportedModelError, match=r"model type 'llama', which looks like a text-only model,.*llava"):
        gripvlm.prune_inputs(text_only, llava_inputs([1], [4]), "norm", keep=4)


def test_a_transformers_that_is_too_old_is_named(model, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda input_ids=None: None)
    with pytest.raises(UnsupportedModelError, match=r"transformers>=5.19"):
        gripvlm.encode(model, llava_inputs([1], [4]))


def test_speculative_decoding_is_refused(model, inputs):
    with gripvlm.prune(model, "norm", keep=3):
        for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(InputError, match="speculative decoding is not supported"):
                model.generate(**inputs, **SHORT, **options)


def test_an_encoding_must_fit_the_prompts(model, inputs):
    encoded = gripvlm.encode(model, inputs)
    with pytest.raises(InputError, match="2 prompts, but images are encoded for 1"):
        gripvlm.prune_inputs(model, inputs, "norm", keep=3, encoded=encoded.take([0]))
    with pytest.raises(InputError, match="sample 0 has 16 image placeholder tokens, but 32 visual tokens"):
        gripvlm.prune_inputs(model, inputs, "norm", keep=3, encoded=encoded.take([1, 0]))


def test_a_pruner_that_needs_a_raster_says_so_where_there_is_none(inputs):
    """With the CLS row kept in front, 17 rows are no grid."""
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"
    ids = inputs["input_ids"][:1, -3:]
    with_cls = {
        "input_ids": torch.cat((torch.full((1, 17), IMAGE), ids), 1),
        "pixel_values": inputs["pixel_values"][:1],
    }
    assert gripvlm.prune_inputs(model, with_cls, "norm", keep=3)["input_ids"].shape[1] == 6
    with pytest.raises(PrunerError, match="'grid' needs rows in a plain raster, but the 17 rows"):
        gripvlm.prune_inputs(model, with_cls, "grid", keep=3)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("mllama", "'mllama' is not supported, because its visual tokens are read by cross-attention"),
        ("llama4", "because its forward projects.* in transformers 5.24 it fails"),
        ("qwen3_vl_next", r"the nearest is qwen3_vl.*docs/add-a-model\.md says how"),
    ],
)
def test_other_families_hear_the_reason_and_the_nearest(monkeypatch, model_type, says):
    model = tiny_llava()
    monkeypatch.setattr(type(model.config), "model_type", model_type)
    with pytest.raises(UnsupportedModelError, match=says):
        gripvlm.encode(model, llava_inputs([1], [4]))


def test_videos_are_refused_where_the_family_takes_none(model, inputs):
    videos = inputs | {"pixel_values_videos": torch.zeros(1, 2, 3, 32, 32)}
    with pytest.raises(InputError, match=r"videos are not supported for llava: .*frames as images"):
        gripvlm.prune_inputs(model, videos, "norm", keep=4)
