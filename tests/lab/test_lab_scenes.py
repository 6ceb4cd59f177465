"""The lab's generator: splits that share nothing, labels and evidence that are where things are."""

import importlib.util
from itertools import combinations

import numpy as np
import pytest

from gripvlm.lab import art
from gripvlm.lab.vlm import build_tokenizer, prompt, spell

ART_PACKAGES = ("qtawesome", "manimgx_fonts", "skimage", "sklearn", "scipy", "matplotlib", "font_roboto")
missing = [name for name in ART_PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no {missing}: pip install -e '.[dev,lab]', as `make test` does")


def scene(seed: int, split: str):
    from gripvlm.lab.compose import compose

    return compose(seed, split)


def questions(seed: int, split: str):
    from gripvlm.lab.questions import ask

    return ask(scene(seed, split), split, np.random.default_rng(seed))


@pytest.mark.parametrize("pair", [*combinations(art.SPLITS, 2)])
def test_splits_share_no_drawing_typeface_or_photograph(pair):
    def everything(split: str) -> set[str]:
        drawings = {drawing for name in art.CLASSES for drawing in art.drawings(name, split)}
        return drawings | set(art.clutter(split)) | set(art.typefaces(split)) | set(art.photographs(split))

    assert not everything(pair[0]) & everything(pair[1])


def test_every_split_has_most_classes_and_every_class_is_taught():
    assert art.classes("train") == art.CLASSES
    assert min(len(art.classes(split)) for split in art.SPLITS) >= 25


def test_every_drawing_and_character_has_ink():
    for split in art.SPLITS:
        for name in art.classes(split):
            for drawing in art.drawings(name, split):
                mask = art.icon(drawing, 20)
                assert max(mask.shape) == 20, drawing
                assert (mask > 127).mean() > 0.05, drawing


@pytest.mark.parametrize("split", art.SPLITS)
def test_a_seed_is_a_picture(split):
    first, again, other = scene(3, split), scene(3, split), scene(4, split)
    assert first.image.dtype == np.uint8
    assert first.image.shape == (128, 128, 3)
    assert np.array_equal(first.image, again.image)
    assert first.parts == again.parts
    assert not np.array_equal(first.image, other.image)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, val, test"):
        scene(0, "dev")


def test_labels_are_where_the_parts_are():
    from gripvlm.lab.pool import CLASS_NAMES, HEADS, labels

    for seed in range(10):
        made = scene(seed, "train")
        planes = dict(zip(HEADS, labels(made).reshape(len(HEADS), 16, 16), strict=True))
        for part in made.parts:
            if part.cls not in art.CLASSES or part.big < 0:  # free-standing icons: nothing overlaps their middle
                continue
            x, y = (part.box[0] + part.box[2]) / 2, (part.box[1] + part.box[3]) / 2
            row, column = min(int(y / 8), 15), min(int(x / 8), 15)
            assert CLASS_NAMES[planes["cls"][row, column]] == part.cls
            assert HEADS["colour"][planes["colour"][row, column]] == part.colour


def test_evidence_covers_the_thing_asked_about():
    made = scene(11, "test")
    for i, thing in enumerate(made.things):
        if thing.kind == "icon":
            cells = made.evidence([i]).reshape(16, 16)
            x0, y0, x1, y1 = thing.box
            area = max(0, min(x1, 128) - max(x0, 0)) * max(0, min(y1, 128) - max(y0, 0))
            assert cells.sum() * 64 == pytest.approx(area, rel=1e-6)


def test_evidence_is_as_small_as_in_real_benchmarks():
    areas = [q.evidence.sum() / 256 for seed in range(40) for q in questions(seed, "test") if q.evidence.any()]
    assert 0.005 < np.median(areas) < 0.065  # TextVQA 0.98 %, GQA 6.5 % (median box area)
    assert max(areas) < 0.25


def test_questions_are_answerable_and_balanced():
    tokenizer = build_tokenizer()
    families = {}
    for seed in range(40):
        for q in questions(seed, "test"):
            families.setdefault(q.family, []).append(q)
            ids = tokenizer(prompt(q.question), add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids, q.question
            if q.choices:
                assert len(set(q.choices)) == 4
                assert q.answer in q.choices
    assert set(families) == {"existence", "perception", "science", "diagram", "reading", "text"}
    for family in ("existence", "perception"):
        assert np.mean([q.answer == "yes" for q in families[family]]) == pytest.approx(0.5, abs=0.01)
    for a, b in zip(families["perception"][::2], families["perception"][1::2], strict=True):
        assert {a.answer, b.answer} == {"yes", "no"}
        assert a.kind == b.kind


def test_no_question_is_about_something_absent_except_existence():
    for seed in range(20):
        for q in questions(seed, "val"):
            assert q.evidence.any() == (q.family != "existence" or q.answer == "yes")


def test_what_is_read_is_spelled_and_decoded_whole():
    tokenizer = build_tokenizer()
    assert tokenizer.decode(spell("atm7", tokenizer)) == "atm7"
