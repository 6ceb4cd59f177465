"""What all prompts of a batch begin with is read once, and nobody can tell from the logits."""

from __future__ import annotations

import pytest
import torch

from gripvlm import encode, prune_inputs
from gripvlm.grip.train import prefix
from gripvlm.grip.train.prefix import Prefix, shared_length
from gripvlm.grip.train.rollout import Engine
from gripvlm.models import adapter as seam
from gripvlm.models.compat import cache_in
from gripvlm.models.text import full_mask
from tiny_families import TINY, build, make
from tiny_train import asked, tiny_vlm

EXACT = sorted(set(TINY) - {"gemma3", "gemma4", "paligemma", "lfm2_vl", "qwen3_5"})
SYSTEM = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def prompts(name: str) -> dict[str, torch.Tensor]:
    """Two ragged prompts of a family, each with SYSTEM behind its first token."""
    inputs = make(TINY[name], [1, 2], [7, 12]).inputs
    ids, mask = inputs["input_ids"], full_mask(build(name), inputs)
    starts = (mask == 0).sum(-1).tolist()
    rows = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": []}
    for b, start in enumerate(starts):
        added = {"input_ids": torch.tensor(SYSTEM), "attention_mask": torch.ones(len(SYSTEM), dtype=mask.dtype)}
        for key, found in rows.items():
            row = {"input_ids": ids, "attention_mask": mask}.get(key, inputs.get(key))
            if row is not None:
                middle = added.get(key, torch.zeros(len(SYSTEM), dtype=row.dtype))
                found.append(torch.cat((row[b, : start + 1], middle, row[b, start + 1 :])))
    return {**inputs, **{key: torch.stack(found) for key, found in rows.items() if found}}


def shared(name: str, inputs: dict[str, torch.Tensor]) -> int:
    model = build(name)
    spans = seam.locate(model, inputs["input_ids"], encode(model, inputs))
    return shared_length(model, inputs["input_ids"], inputs["attention_mask"], spans)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_going_on_from_the_prefix_gives_the_same_logits(name):
    model, inputs = build(name), prompts(name)
    length = shared(name, inputs)
    assert length == 1 + len(SYSTEM)
    arguments = prune_inputs(model, inputs, "norm", 3)
    whole = model(**arguments).logits
    part = Prefix.of(model, arguments, length).without(arguments)
    assert part["input_ids"].shape[1] == arguments["input_ids"].shape[1] - length
    rest = model(**part).logits
    real = arguments["attention_mask"][:, length:].bool()
    real[:, : int((arguments["attention_mask"] == 0).sum(-1).max())] = False
    assert real.any(-1).all()
    scale = TINY[name].tolerance * 10
    assert torch.allclose(whole[:, length:][real], rest[real], atol=scale, rtol=scale)


@pytest.mark.parametrize("name", sorted(set(TINY) - set(EXACT)))
def test_families_that_cannot_go_on_from_a_cache_share_nothing(name):
    assert shared(name, prompts(name)) == 0


def test_only_what_all_prompts_begin_with_is_shared():
    inputs = prompts("llava")
    inputs["input_ids"][1, (inputs["attention_mask"][1] == 0).sum() + 10] = 77  # the last of SYSTEM
    assert shared("llava", inputs) == 10
    inputs["input_ids"][1, (inputs["attention_mask"][1] == 0).sum() + 3] = 77
    assert shared("llava", inputs) == 0  # too short to pay


def test_sliding_windows_share_nothing(monkeypatch):
    inputs = prompts("llava")
    monkeypatch.setattr(build("llava").config.get_text_config(), "sliding_window", 8, raising=False)
    assert shared("llava", inputs) == 0


def test_rollouts_share_the_system_prompt_of_their_batch(monkeypatch):
    model, processor = tiny_vlm()
    processor.chat_template = processor.chat_template.replace("{%", "is there a cat next to the dog? yes{%", 1)
    engine = Engine(model, processor, rollout_batch_size=2)
    task = asked(pictures=2, each=2)
    questions = [(task, sample) for sample in task.samples]
    kept = [[torch.tensor([1, 5, 9])], [torch.tensor([0])], [torch.arange(16)], [torch.tensor([2, 3])]]

    widths: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = {}
    for shortest in (8, 10**6):
        monkeypatch.setattr(prefix, "SHORTEST", shortest)
        batch = engine.prepare(questions)
        widths.clear()
        rollout = engine.run(batch, range(4), kept)
        found[shortest] = (rollout.log_probs, engine.full_logits(batch), list(widths), batch.prefix_length)
    hook.remove()
    (few, full, short, length), (plain, all_, long, none) = found[8], found[10**6]
    assert torch.allclose(few, plain, atol=1e-4)
    assert torch.allclose(full, all_, atol=1e-4)
    assert none == 0
    assert length >= 8
    assert short[0] == length  # read once
    assert short[1:] == [width - length for width in long]


@torch.no_grad()
def test_rows_share_the_prefixs_memory_and_leave_it_as_it_was():
    model, inputs = build("llava"), prompts("llava")
    arguments = prune_inputs(model, inputs, "norm", 3)
    made = Prefix.of(model, arguments, 1 + len(SYSTEM))
    before = [layer.keys.clone() for layer in made._cache.layers]
    part = made.without(arguments)
    for own, given in zip(made._cache.layers, cache_in(part).layers, strict=True):
        assert given.keys.data_ptr() == own.keys.data_ptr()
        assert len(given.keys) == len(given.values) == 2
    first = model(**part).logits
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, made._cache.layers, strict=True))
    assert torch.equal(model(**made.without(arguments)).logits, first)
