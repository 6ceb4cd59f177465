"""Draws follow.webp, README's moving picture: which tokens `grip` keeps of one picture, question after question.

    python -m experiments.grip_shipped.follow      a few seconds on one core

The picture is the sample's 0003; the last question is one that the pruned model answers wrong.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import gripvlm
from gripvlm import lab
from gripvlm.eval import make_inputs
from gripvlm.tasks import get_tasks

TARGET = Path(__file__).with_name("follow.webp")
PICTURE = "0003"
QUESTIONS = (
    "is the fish at the top?",
    "what comes after the fish?",
    "what is written next to the book?",
    "read the word.",
    "what does f point to?",
    "do you see two bikes?",
)
KEEP = 26
SIDE, PANEL, CELLS = 400, 400, 16  # pixels of the picture and of the text beside it; tokens of a side
PAPER, INK, GREY, RIGHT, WRONG = (252, 252, 250), (24, 28, 36), (96, 102, 112), (20, 120, 60), (190, 40, 40)
ASKED, FADING, ANSWERED = 900, 70, 1900  # milliseconds


class Shown(NamedTuple):
    """A question with the answers of the unpruned and the pruned model, and the tokens that the latter had."""

    question: str
    right: str
    full: str
    pruned: str
    kept: list[int]


def ask() -> tuple[Image.Image, list[Shown]]:
    """The picture, and what the model answers with all of its tokens and with KEEP of them."""
    model, processor = lab.load()
    found = {
        sample.question: (task, sample)
        for task in get_tasks("lab")
        for sample in task.samples
        if sample.id.startswith(f"{PICTURE}-")
    }
    chosen = [found[question] for question in QUESTIONS]
    texts = [task.prompt(sample) for task, sample in chosen]
    inputs = make_inputs(model, processor, texts, [sample.images for _, sample in chosen])
    start = inputs["input_ids"].shape[1]

    def answers() -> list[str]:
        ids = model.generate(**inputs, max_new_tokens=8)
        return [text.strip() for text in processor.batch_decode(ids[:, start:], skip_special_tokens=True)]

    full = answers()
    with gripvlm.prune(model, "grip", keep=KEEP) as record:
        pruned = answers()
    kept = [images[0].indices.tolist() for images in record.selections]
    rights = [sample.answer for _, sample in chosen]
    picture = chosen[0][1].images[0].convert("RGB")
    return picture, [Shown(*one) for one in zip(QUESTIONS, rights, full, pruned, kept, strict=True)]


def faded(picture: Image.Image, kept: list[int], share: float) -> Image.Image:
    """The picture, enlarged, with the dropped cells darkened by `share` of the way."""
    mask = np.full(CELLS * CELLS, 1 - 0.85 * share)
    mask[kept] = 1
    cell = picture.width // CELLS
    light = np.kron(mask.reshape(CELLS, CELLS), np.ones((cell, cell)))[..., None]
    pixels = (np.asarray(picture) * light).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def frame(picture: Image.Image, shown: Shown, share: float, answered: bool) -> Image.Image:
    """One frame: the picture left, the question and the answers right."""
    canvas = Image.new("RGB", (SIDE + PANEL, SIDE), PAPER)
    canvas.paste(faded(picture, shown.kept, share), (0, 0))
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(32), ImageFont.load_default(21)
    left, top = SIDE + 28, 44
    for line in textwrap.wrap(shown.question, 22):
        draw.text((left, top), line, INK, large)
        top += 42
    count = KEEP if answered else CELLS * CELLS
    draw.text((left, 176), f"{count} of {CELLS * CELLS} visual tokens", GREY, small)
    answer = shown.pruned if answered else shown.full
    correct = answer == shown.right
    draw.text((left, 212), answer, RIGHT if correct else WRONG, ImageFont.load_default(44))
    draw.text((left, 276), "right" if correct else f"wrong: it is {shown.right}", RIGHT if correct else WRONG, small)
    draw.text((left, SIDE - 44), "gripvlm on its lab model", GREY, ImageFont.load_default(17))
    return canvas


def main() -> None:
    picture, questions = ask()
    frames, times = [], []
    for shown in questions:
        steps = [(0.0, False, ASKED), *((share, False, FADING) for share in (0.3, 0.6, 0.85)), (1.0, True, ANSWERED)]
        for share, answered, milliseconds in steps:
            frames.append(frame(picture, shown, share, answered))
            times.append(milliseconds)
    frames[0].save(
        TARGET,
        save_all=True,
        append_images=frames[1:],
        duration=times,
        loop=0,
        quality=80,
        method=6,
        minimize_size=True,
    )
    for shown in questions:
        print(*shown[:4], sep=" | ")
    print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.0f} KB, {len(frames)} frames, {sum(times) / 1e3:.0f} s")


if __name__ == "__main__":
    main()
