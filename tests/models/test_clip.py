"""CDPruner with CLIP's own text tower, on a tiny random CLIP, against float64 and one token at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import gripvlm
from gripvlm.errors import InputError, PrunerError, UnsupportedModelError
from gripvlm.models.clip import ClipText
from gripvlm.pruners import get_pruner
from gripvlm.pruners.input.cdpruner import CDPruner
from naive import cosine
from tiny_families import TINY, build, make

CONTEXT = 8
QUESTIONS = ["bcd", "zyxwvutsrqp"]  # the second needs two pieces of 6


class Letters:
    """A tokenizer: one token a letter."""

    bos_token_id, eos_token_id = 1, 98

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 90 for letter in text]}


def tiny_clip(**vision: Any) -> CLIPModel:
    torch.manual_seed(3)
    text = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": CONTEXT, "eos_token_id": 98}
    same = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    same |= {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=same | vision, projection_dim=16))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in clip.parameters():
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return clip.eval()


def slow_cosines(clip: CLIPModel, patches: torch.Tensor, question: str) -> list[float]:
    """Mean over the question's pieces, one patch at a time, in float64."""
    double = copy.deepcopy(clip).double()
    ids = Letters()(question, False)["input_ids"]
    texts = []
    with torch.no_grad():
        for start in range(0, len(ids), CONTEXT - 2):
            piece = torch.tensor([[1, *ids[start : start + CONTEXT - 2], 98]])
            states = double.text_model(input_ids=piece).last_hidden_state[0, -1]  # the end token's
            texts.append(double.text_projection(states))
        rows = double.visual_projection(double.vision_model.post_layernorm(patches.double()))
    return [sum(cosine(row, text) for text in texts) / len(texts) for row in rows]


def slow_choice(features: torch.Tensor, c: list[float], k: int) -> list[int]:
    """argmax det L_S one token at a time; relevance is minus the cosine."""
    c = [-value for value in c]
    r = [(value - min(c)) / (max(c) - min(c)) + 1e-6 for value in c]
    n = len(c)
    kernel = [[r[i] * cosine(features[i], features[j]) * r[j] for j in range(n)] for i in range(n)]
    matrix, chosen = torch.tensor(kernel, dtype=torch.float64), []
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(matrix[[*chosen, i]][:, [*chosen, i]]))))
    return sorted(chosen)


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_cdpruner_follows_the_paper_with_clips_text_tower(keep):
    model, inputs = build("llava"), make(TINY["llava"], [1, 2], [7, 9]).inputs
    clip = tiny_clip()
    pruner = CDPruner(clip=ClipText(clip, Letters(), QUESTIONS))
    assert pruner.needs == {"features", "patches"}
    with gripvlm.prune(model, pruner, keep) as record:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    with torch.no_grad():
        encoded = gripvlm.encode(model, inputs, [pruner])
    other = 0
    for question, items, selections in zip(QUESTIONS, encoded.samples, record.selections, strict=True):
        for item, selection in zip(items, selections, strict=True):
            cosines = slow_cosines(clip, item.patches, question)
            fast = pruner.clip.cosine(item.patches, QUESTIONS.index(question))
            assert fast.tolist() == pytest.approx(cosines, abs=1e-5)
            assert selection.indices.tolist() == slow_choice(item.features, cosines, keep)
            other += selection.indices.tolist() != slow_choice(item.features, [-value for value in cosines], keep)
    assert other  # the sign counts


def test_one_question_for_all():
    assert len(ClipText(tiny_clip(), Letters(), "bcd").texts) == 1
    assert CDPruner().needs == {"features", "question"}
    assert get_pruner("cdpruner") == CDPruner()


def test_what_is_refused():
    model, inputs = build("llava"), make(TINY["llava"], [1, 2], [7, 9]).inputs
    clip = tiny_clip()
    with pytest.raises(InputError, match=r"a CLIPVisionModel has no get_text_features: pass a transformers\.CLIPModel"):
        ClipText(clip.vision_model, Letters(), "b")
    with pytest.raises(InputError, match="question '' has no tokens"):
        ClipText(clip, Letters(), ["b", ""])
    with pytest.raises(InputError, match="no question for prompt 1: ClipText got 1"):
        gripvlm.prune_inputs(model, inputs, CDPruner(clip=ClipText(clip, Letters(), ["b"])), 4)
    wide = ClipText(tiny_clip(hidden_size=48), Letters(), "b")
    with pytest.raises(
        UnsupportedModelError, match="hidden_size=48, the model's has hidden_size=32: pass the CLIPModel"
    ):
        gripvlm.prune_inputs(model, inputs, CDPruner(clip=wide), 4)
    with pytest.raises(PrunerError, match="from Python"):
        get_pruner("cdpruner:clip=openai")
