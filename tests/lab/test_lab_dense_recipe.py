"""lab-dense's recipe, examples/lab_dense: labels lie where things are, answers are right, evidence is enough."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import test_lab_recipe
import torch

from lab_dense import blocks, packing, pool, vlm
from lab_dense.boards import GRID, KINDS, Facts, compose, units
from lab_dense.dataset import FIRST
from lab_dense.questions import ALONE, FAMILIES, NUMBERS, OF_SEVERAL, ORDINALS, PATCHES, Question, Things, ask, order
from lab_vlm import art
from lab_vlm.packing import block_mask
from places import ROOT

pytestmark = test_lab_recipe.pytestmark


@pytest.fixture(scope="module")
def boards():
    return [compose(seed, "val") for seed in range(24)]


@pytest.fixture(scope="module")
def things(boards):
    return [Things(Facts(board.things, board.centre, units(board))) for board in boards]


def asked(things, family, count=40) -> list[tuple[Question, list[Things]]]:
    """Questions of a family about one, two and four of the boards."""
    rng, found = np.random.default_rng(3), []
    for i in range(6 * count):
        size = (1, 2, 4)[i % 3]
        prompt = [things[j] for j in rng.permutation(len(things))[:size]]
        question = ask(prompt, family, rng)
        if question is not None:
            found.append((question, prompt))
    return found[:count]


def test_a_board_depends_on_its_seed_and_split_alone(boards):
    again = compose(3, "val")
    assert np.array_equal(again.scene.image, boards[3].scene.image)
    assert again.things == boards[3].things
    assert compose(3, "scorer").things != again.things
    with pytest.raises(ValueError, match=r"split is 'tune'; choose one of train, val, test, scorer"):
        compose(3, "tune")


def test_seeds_of_question_sets_lie_apart_from_each_other_and_from_training():
    assert len(set(FIRST.values())) == len(art.SPLITS)
    assert min(FIRST.values()) >= 300_000
    assert min(abs(a - b) for a in FIRST.values() for b in FIRST.values() if a != b) >= 100_000


def test_every_thing_and_character_has_a_patch(boards):
    for board in boards:
        shown = units(board)
        singles = [i for i, (kind, _, _) in enumerate(board.things) if kind != "sign"]
        characters = sum(len(name) for kind, name, _ in board.things if kind == "sign")
        wanted = {*singles, *range(len(board.things), len(board.things) + characters)}
        assert wanted <= set(shown.tolist())


def test_distractors_are_as_many_and_drawn_alike(boards):
    assert np.mean([len(board.things) for board in boards]) > 25
    assert {kind for board in boards for kind, _, _ in board.things} == set(KINDS)


def test_labels_say_what_lies_at_a_patch(boards):
    board = boards[0]
    planes, shown = pool.labels(board), units(board)
    heads = list(pool.HEADS)
    for i, (kind, name, colour) in enumerate(board.things):
        cells = np.flatnonzero(shown == i)
        if kind == "sign":
            continue
        assert {pool.HEADS["kind"][v] for v in planes[heads.index("kind"), cells]} == {kind}
        assert {pool.HEADS["colour"][v] for v in planes[heads.index("colour"), cells]} == {colour}
        if kind == "number":
            assert {pool.HEADS["tens"][v] for v in planes[heads.index("tens"), cells]} == {name[0]}
            assert {pool.HEADS["units"][v] for v in planes[heads.index("units"), cells]} == {name[1]}
    assert not planes[:, shown < 0].any()


def seen(prompt: list[Things], question: Question) -> list[tuple[str, str, str]]:
    """What the evidence shows, one (kind, name, colour) a unit."""
    found = []
    for group in question.evidence:
        p, unit = group[0]
        found.append(prompt[p].facts.things[unit])
    return found


@pytest.mark.parametrize(
    "family", ["colours", "classes", "common", "overall", "most", "single", "extreme", "holder", "count"]
)
def test_the_answer_follows_from_the_evidence_alone(things, family):
    """Worked out again from what the evidence shows, without the rest of the board."""
    questions = asked(things, family)
    assert len(questions) >= 10
    for question, prompt in questions:
        shown = seen(prompt, question)
        names, colours = [n for _, n, _ in shown], [c for _, _, c in shown]
        if family == "colours":
            answer = max(set(colours), key=colours.count)
            assert abs(2 * colours.count(answer) - len(colours)) >= 2
        elif family == "classes":
            answer = max(set(names), key=names.count)
        elif family == "extreme":
            answer = (max if "largest" in question.question else min)(names)
        elif family in ("common", "overall"):
            answer = max(set(colours), key=colours.count)
        elif family == "most":
            answer = max(set(names), key=names.count)
        elif family == "single":
            (answer,) = (colour for colour in set(colours) if colours.count(colour) == 1)
        elif family == "holder":
            best = (max if "largest" in question.question else min)(names)
            (answer,) = {colour for name, colour in zip(names, colours, strict=True) if name == best}
        else:
            answer = NUMBERS[len(shown)]
        assert question.answer == answer, question.question


def test_corner_half_pictures_both_and_where_are_answered_by_place(things):
    for question, prompt in asked(things, "corner"):
        (picture,) = {group[0][0] for group in question.evidence}
        places = [prompt[picture].facts.centre[group[0][1]] > 64 for group in question.evidence]
        corners = [f"{('top', 'bottom')[int(y)]} {('left', 'right')[int(x)]}" for x, y in places]
        assert question.answer == max(set(corners), key=corners.count)
    for question, prompt in asked(things, "where"):
        ((picture, unit), *_) = question.evidence[0]
        assert question.answer == ORDINALS[picture]
        name = prompt[picture].facts.things[unit][1]
        others = [t for p, t in enumerate(prompt) if p != picture]
        assert not any(name == other for t in others for _, other, _ in t.facts.things)
    for question, prompt in asked(things, "half"):
        (picture,) = {group[0][0] for group in question.evidence}
        places = [prompt[picture].facts.centre[group[0][1]] for group in question.evidence]
        x, y = np.sign(np.array(places) - 64).sum(0)
        side = ("left" if x < 0 else "right") if "left" in question.question else ("top" if y < 0 else "bottom")
        assert question.answer == side
    for question, _ in asked(things, "pictures"):
        counts = np.bincount([group[0][0] for group in question.evidence], minlength=4)
        assert question.answer == ORDINALS[int(counts.argmax())]
        assert np.sort(counts)[-1] - np.sort(counts)[-2] >= 2
    for question, prompt in asked(things, "both"):
        assert all(prompt[p].facts.things[u][1] == question.answer for group in question.evidence for p, u in group)


def test_missing_names_one_thing_that_is_nowhere_on_the_board(things):
    for question, prompt in asked(things, "missing"):
        (picture,) = {p for group in question.evidence for p, _ in group}
        on_board = {name for _, name, _ in prompt[picture].facts.things}
        assert question.answer not in on_board
        assert set(question.choices) - {question.answer} <= on_board


def test_nowhere_is_missing_in_all_pictures(things):
    for question, prompt in asked(things, "nowhere"):
        shown = {name for t in prompt for _, name, _ in t.facts.things}
        assert question.answer not in shown
        assert set(question.choices) - {question.answer} <= shown


def test_present_names_the_only_thing_that_is_there(things):
    for question, prompt in asked(things, "present"):
        ((picture, unit), *_) = question.evidence[0]
        shown = {name for _, name, _ in prompt[picture].facts.things}
        assert {*question.choices} & shown == {question.answer}
        assert prompt[picture].facts.things[unit][1] == question.answer
        assert ORDINALS[picture] in question.question or len(prompt) == 1


def test_what_cannot_be_read_among_several_pictures_is_asked_about_one(things):
    for family in ALONE:
        assert {len(prompt) for _, prompt in asked(things, family)} == {1}


def test_a_string_is_spelled_by_its_units(boards, things):
    for question, prompt in asked(things, "string"):
        parts = []
        for group in question.evidence:
            (p, unit), board = group[0], boards[things.index(prompt[group[0][0]])]
            assert prompt[p] in things
            owner = board.scene.owners().reshape(-1)[np.flatnonzero(prompt[p].facts.units == unit)[0]]
            parts.append(board.scene.parts[owner].cls)
        assert "".join(parts) == question.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_starts_with_one_cell_of_each_group(things, family):
    for question, prompt in asked(things, family):
        cells = order(question, [t.facts for t in prompt])
        assert len(set(cells)) == len(cells)
        first = cells[: len(question.evidence)]
        for cell in first:
            picture, at = divmod(cell, PATCHES)
            unit = int(prompt[picture].facts.units[at])
            assert sum((picture, unit) in group for group in question.evidence) == 1
        hit = [[(c // PATCHES, int(prompt[c // PATCHES].facts.units[c % PATCHES])) for c in first]]
        assert all(any(unit in group for unit in hit[0]) for group in question.evidence)
        assert (family in OF_SEVERAL) <= (len(prompt) > 1)


def test_the_chat_template_is_the_training_prompt():
    processor = vlm.build_processor()
    for count in (1, 2, 4):
        content = [*[{"type": "image"}] * count, {"type": "text", "text": "how many things are red?"}]
        shown = processor.apply_chat_template([{"role": "user", "content": content}])
        assert shown == vlm.prompt("how many things are red?", count)
    assert "<unk>" not in processor.tokenizer.tokenize(vlm.prompt("in the fourth picture, are there more cats?", 4))


def packed_batch(things, way):
    packer, rng = packing.Packer(), np.random.default_rng(0)
    prompts = [[things[0], things[1]], [things[2], things[3]]]
    batch = []
    for prompt in prompts:
        questions = [q for q in (ask(prompt, family, rng) for family in FAMILIES) if q is not None]
        cells = [[[np.flatnonzero(prompt[p].facts.units == u) + p * PATCHES for p, u in g] for g in q.evidence]
                 for q in questions]  # fmt: skip
        groups = [[np.concatenate(group) for group in of_question] for of_question in cells]
        batch.append(
            [
                packing.Asked(q.family, *packer.tokens(q.question, q.answer, q.family in ("string", "extreme")), g)
                for q, g in zip(questions, groups, strict=True)
            ]
        )
    unit = [np.concatenate([np.where(t.facts.units >= 0, t.facts.units + 1000 * p, -1) for p, t in enumerate(prompt)])
            for prompt in prompts]  # fmt: skip
    keep = packing.drop(batch, unit, way, 0.3, rng)
    return batch, unit, keep, packer.pack(batch, keep, 2, renumber=False)


@pytest.mark.parametrize("way", packing.WAYS)
def test_dropping_keeps_as_many_in_every_prompt(things, way):
    _, unit, keep, packed = packed_batch(things, way)
    assert len({len(k) for k in keep}) == 1
    assert (packed.ids == packing.IMAGE).sum(1).tolist() == [len(k) for k in keep]
    if way == "even":
        for u, k in zip(unit, keep, strict=True):
            assert {*u[k].tolist()} >= {*u[u >= 0].tolist()}  # every thing is seen


@pytest.mark.parametrize("way", ["full", "even", "blind"])
def test_attention_in_blocks_equals_the_mask(things, way):
    """The same logits as SDPA with the mask over the whole sequence."""
    _, _, _, packed = packed_batch(things, way)
    torch.manual_seed(0)
    model = vlm.build_model(layers=6).eval()
    embeds = model.get_input_embeddings()(packed.ids)
    wanted = packed.target >= 0
    with torch.no_grad():
        common = {"inputs_embeds": embeds, "position_ids": packed.positions, "use_cache": False}
        mask = block_mask(packed.segment)
        plain = model.model.language_model(attention_mask=mask, **common).last_hidden_state[wanted]
        model.set_attn_implementation({"text_config": blocks.NAME})
        ours = model.model.language_model(
            attention_mask=packed.segment >= 0, blocks=blocks.Blocks.of(packed.segment), **common
        ).last_hidden_state[wanted]
    assert torch.allclose(plain, ours, atol=1e-4)


def test_more_words_and_layers_change_no_answer_of_the_first_lab():
    from gripvlm import lab

    first, deeper = lab.load()[0], vlm.build_model(layers=7).eval()
    pixels = torch.randn(1, 3, 128, 128)
    ids = torch.tensor([[1, *[packing.IMAGE] * 256, 20, 21, 22]])
    with torch.no_grad():
        old = first(input_ids=ids, pixel_values=pixels).logits
        new = deeper(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(new[..., : old.shape[-1]], old)


def test_questions_are_written_as_a_file_that_training_reads(tmp_path):
    out = tmp_path / "val"
    command = [sys.executable, "-m", "lab_dense.dataset", str(out), "--split", "val", "--groups", "2", "1", "1"]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT / "examples")}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert rows[0]["evidence_grid"] == [GRID, GRID]
    assert {len(row["image"]) if isinstance(row["image"], list) else 1 for row in rows} == {1, 2, 4}
    from gripvlm.tasks import get_tasks

    (task,) = get_tasks(f"jsonl:{out / 'questions.jsonl'}")
    assert len(task.samples) == len(rows)
    assert len({sample.image_id for sample in task.samples}) == 4
