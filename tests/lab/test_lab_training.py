"""The recipe's own mechanics: packing many questions behind one picture changes no answer."""

import numpy as np
import pytest
import torch

from gripvlm.lab import train_reader
from gripvlm.lab.questions import Question
from gripvlm.lab.vlm import prompt
from tiny_lab import tiny_lab


def asked(answers: tuple[str, ...]) -> list[Question]:
    evidence = np.zeros(256, dtype=np.uint8)
    evidence[40:44] = 255
    texts = ("is there a cat?", "what is written next to the dog?", "is the dog red?")
    families = ("existence", "text", "perception")
    return [Question(f, "k", t, a, evidence) for f, t, a in zip(families, texts, answers, strict=True)]


@pytest.mark.parametrize("kept", [256, 31, 0])
@torch.no_grad()
def test_a_packed_question_is_answered_as_if_alone(kept):
    model, _ = tiny_lab()
    packer = train_reader.Packer()
    rng = np.random.default_rng(0)
    keep = [np.sort(rng.permutation(256)[:kept]) for _ in range(2)]
    questions = [asked(("yes", "abc", "no")), asked(("no", "k7", "yes"))]
    packed = packer.pack(questions, keep, renumber=False)
    features = torch.randn(2, 256, 32)
    logits = train_reader.forward(model, features, packed)
    rows = iter(logits)
    for picture, mine in enumerate(questions):
        visual = model.model.multi_modal_projector(features[picture, keep[picture]])
        for question in mine:
            _, answer = packer.tokens(question)
            text = packer.tokenizer(prompt(question.question, image=False), add_special_tokens=False)["input_ids"]
            ids = torch.tensor([text + answer[:-1]])
            table = model.get_input_embeddings()
            alone = model.model.language_model(
                inputs_embeds=torch.cat([table(torch.tensor([[1]])), visual[None], table(ids)], dim=1),
                position_ids=torch.cat(
                    [
                        torch.zeros(1, 1, dtype=torch.long),
                        1 + torch.from_numpy(keep[picture])[None],
                        torch.arange(ids.shape[1])[None] + (257 if kept else 1),
                    ],
                    dim=1,
                ),
                attention_mask=torch.ones(1, 1 + kept + ids.shape[1], dtype=torch.long),
                use_cache=False,
            ).last_hidden_state[0, -len(answer) :]
            for expected in model.lm_head(alone):
                assert torch.allclose(next(rows), expected, atol=2e-4, rtol=1e-4)
    assert next(rows, None) is None


def test_dropping_keeps_as_many_of_each_picture_and_sometimes_none():
    rng = np.random.default_rng(1)
    questions = [asked(("yes", "abc", "no"))] * 3
    sizes = []
    for _ in range(300):
        kept = train_reader.drop(questions, rng, True)
        assert len({len(k) for k in kept}) == 1
        assert all((np.diff(k) > 0).all() for k in kept)
        sizes.append(len(kept[0]))
    assert {0, 256} <= set(sizes)
    assert 0.2 < np.mean([s == 256 for s in sizes]) < 0.45
    assert all(len(k) in (0, 256) for _ in range(100) for k in train_reader.drop(questions, rng, False))


def test_the_hint_reads_the_attention_that_the_model_computes():
    model, _ = tiny_lab()
    model.set_attn_implementation("eager")
    try:
        rows = train_reader.AttentionRows(model, (1,))
        seen = {}
        handle = model.model.language_model.layers[1].self_attn.register_forward_hook(
            lambda module, args, output: seen.update(weights=output[1])
        )
        packer = train_reader.Packer()
        packed = packer.pack([asked(("yes", "abc", "no"))], [np.arange(256)], renumber=False)
        with torch.no_grad():
            train_reader.forward(model, torch.randn(1, 256, 32), packed)
            mass = rows.mass(packed)[0].exp()
        handle.remove()
    finally:
        model.set_attn_implementation("sdpa")
    weights = seen["weights"][0, :3, :, 1:257]  # [heads, queries, visual]
    for got, (_, index) in zip(mass, packed.row.tolist(), strict=True):
        share = weights[:, 257 + index] / weights[:, 257 + index].sum(-1, keepdim=True)
        assert got == pytest.approx(float(share[:, 40:44].sum(-1).mean()) + 1e-4, abs=1e-4)
