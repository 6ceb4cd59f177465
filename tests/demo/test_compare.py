"""Methods side by side, without a page: what is said of an answer is what the model itself says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import gripvlm
from gripvlm import lab
from gripvlm.demo import Asker
from gripvlm.demo.show import described, sheet, why
from gripvlm.errors import GripError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.pruners.baselines.given import Given
from gripvlm.report import layout
from gripvlm.tasks import get_tasks
from gripvlm.types import Selection

QUESTION = "read the purple sign."
METHODS = ["grip", "random", "pool", "fastv"]


@pytest.fixture(scope="module")
def asker():
    return Asker(*lab.load(), max_new_tokens=8)


@pytest.fixture(scope="module")
def image():
    (task,) = get_tasks("lab/reading")
    return next(sample for sample in task.samples if sample.question == QUESTION).images[0]


@pytest.fixture(scope="module")
def found(asker, image):
    return asker.compare([image], QUESTION, METHODS, 0.1)


def decoded(asker, image, pruner, keep, forced=None):
    """(ids, probability) of the greedy answer, or of `forced`, by generate's own logits."""
    inputs = make_inputs(asker.model, asker.processor, [QUESTION], [image])
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    length = inputs["input_ids"].shape[1]
    if forced is not None:
        options["prefix_allowed_tokens_fn"] = lambda _, ids: [forced[len(ids) - length]]
    read = question_ids(asker.processor, [QUESTION])
    with gripvlm.prune(asker.model, pruner, keep, question=read):
        out = asker.model.generate(**inputs, **options)
    ids = out.sequences[0, length:].tolist()
    steps = [logits[0].log_softmax(-1)[token] for logits, token in zip(out.logits, ids, strict=True)]
    return ids, float(torch.stack(steps).sum().exp())


def test_probabilities_are_those_of_the_models_own_decoding(asker, image, found):
    ids, probability = decoded(asker, image, "keep_all", 1.0)
    assert found.full.ids == ids
    assert found.full.probability == found.full.of_full == pytest.approx(probability, abs=1e-5)
    random = next(one for one in found.pruned if one.method == "random")
    assert random.ids != ids, "choose a question whose answer random loses"
    own, probability = decoded(asker, image, "random", 0.1)
    assert (random.ids, random.probability) == (own, pytest.approx(probability, abs=1e-5))
    assert random.of_full == pytest.approx(decoded(asker, image, "random", 0.1, forced=ids)[1], abs=1e-5)
    assert random.of_full < random.probability


def test_inside_the_language_model_the_answer_is_scored_as_it_was_decoded(asker, image):
    """FastV reads the prompt's last token: with the answer behind the prompt it would drop others."""
    found = asker.compare([image], QUESTION, ["fastv"], 0.5)
    (fastv,) = found.pruned
    ids, probability = decoded(asker, image, "fastv", 0.5)
    assert (fastv.ids, fastv.probability) == (ids, pytest.approx(probability, abs=1e-5))
    assert fastv.paid == pytest.approx(128, abs=0.5), "a whole number of tokens in each of five layers"
    with pytest.raises(GripError, match="inside the language model"):
        asker.worth(found, fastv, [0])


def test_counts_order_and_what_cannot_be_done(found):
    assert [one.method for one in found.pruned] == ["grip", "random", "pool"]
    assert [sum(one.kept) for one in found.pruned] == [26, 26, 26]
    assert list(found.refused) == ["fastv"]
    assert "keep=103 or more" in found.refused["fastv"]
    grip, _, pool = found.pruned
    assert sorted(sorted(range(256), key=lambda i: -grip.scores[i])[:26]) == [i for i in range(256) if grip.kept[i]]
    assert pool.alone
    assert set(grip.seconds) == {"vision", "pruner", "overhead", "prefill", "decode"}
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert [one["method"] for one in plain["pruned"]] == ["grip", "random", "pool"]
    assert plain["full"]["tokens"] == 256


def test_worth_is_what_asking_with_and_without_a_token_says(asker, image, found):
    """Against answers that are decoded with exactly these tokens, on another path through the code."""
    grip = found.pruned[0]
    kept, dropped = grip.kept.index(True), grip.kept.index(False)
    others = sorted(range(256), key=lambda i: -abs(grip.scores[i]))[:2]
    tokens = [kept, dropped, *others]
    worth = asker.worth(found, grip, tokens)
    for token, value in zip(tokens, worth, strict=True):
        with_it, without = torch.tensor(grip.kept), torch.tensor(grip.kept)
        with_it[token], without[token] = True, False
        asked = []
        for mask in (with_it, without):
            again = asker.compare([image], QUESTION, [Given([[mask.float()]])], int(mask.sum()))
            asked.append(again.pruned[0].of_full)
        assert value == pytest.approx(asked[0] - asked[1], abs=1e-5)
    assert len(asker.worth(found, grip)) == 256
    pool = found.pruned[2]
    with pytest.raises(GripError, match="pool: it merges tokens"):
        asker.worth(found, pool, [0])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tower(norm):block=1", "the vision tower did not see all tokens"),
        ("fastv:layer=1", "inside the language model"),
    ],
)
def test_what_a_token_is_worth_is_not_asked_where_it_cannot_be_added_alone(asker, image, spec, reason):
    (answer,) = asker.compare([image], QUESTION, [spec], 0.3).pruned
    assert reason in answer.alone


def test_an_empty_question_is_refused(asker, image):
    with pytest.raises(GripError, match="the question is empty: type one"):
        asker.compare([image], "  ", ["random"], 0.1)


def test_words_say_why_a_token_went(asker, found):
    grip, _, pool = found.pruned
    token = grip.kept.index(False)
    rank = sorted(range(256), key=lambda i: -grip.scores[i]).index(token) + 1
    text = why(found, grip, token, worth=0.25)
    assert text.startswith(f"grip dropped token {token + 1} of 256. Score {grip.scores[token]:.3g}, rank {rank}. ")
    assert text.endswith(f"with it {100 * min(1, grip.of_full + 0.25):.1f} %.")
    token = grip.kept.index(True)
    assert f"without it {100 * (grip.of_full - 0.25):.1f} %." in why(found, grip, token, worth=0.25)
    assert why(found, pool, 0, None).endswith("is still part of a kept one.")
    lines = described(found, found.pruned[1])
    assert lines[0] == found.pruned[1].text
    assert lines[2].startswith(f"“{found.full.text}”, the answer with all tokens: ")
    assert "26 of 256 visual tokens" in lines


def test_a_click_finds_the_token_under_it(found):
    drawn = sheet(found, found.pruned[0])
    ((part, _, factor),) = drawn.places
    assert drawn.image.size == (128 * factor, 128 * factor)
    for token, (left, top, right, bottom) in enumerate(part.geometry.boxes):
        assert drawn.token_at((left + right) / 2 * factor, (top + bottom) / 2 * factor) == token
    assert drawn.token_at(drawn.image.width + 1, 3) is None


def test_a_click_into_tiles_finds_its_own_part(found):
    """Tiles of 2 x 2 tokens and a whole view below them, as InternVL's processor makes them."""
    image = Image.new("RGB", (640, 320))
    processor = GotOcr2ImageProcessorPil(crop_to_patches=True, min_patches=2, max_patches=2)
    parts = layout(processor, image.size, [(2, 2)] * 3)
    selections = [Selection(torch.tensor([0]), 4) for _ in range(3)]
    drawn = sheet(replace(found, images=[image], parts=parts), replace(found.full, selections=selections))
    assert [part.name for part, _, _ in drawn.places] == ["tiles", "whole"]
    places = [
        ((left + right) / 2 * factor, top + (above + below) / 2 * factor)
        for part, top, factor in drawn.places
        for left, above, right, below in part.geometry.boxes
    ]
    assert [drawn.token_at(*place) for place in places] == list(range(12))
