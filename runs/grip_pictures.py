"""docs/grip-tokens.png: what is kept for six questions on two images, at four budgets, by four pruners.

    python runs/grip_pictures.py WARMUP_FOLDER

The questions are the first of the sample that suit: two images, three questions each about different things.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gripvlm.api import encode
from gripvlm.eval import answer, make_inputs, question_ids
from gripvlm.models.loading import load_model, quiet
from gripvlm.report import geometry, overlay
from gripvlm.tasks import get_tasks

KEEPS = (0.25, 0.1, 0.05, 0.025)
IMAGES = ("0004.webp", "0011.webp")
FAMILIES = ("text", "diagram", "science")
CELL, LEFT, TOP = 150, 330, 34


def main() -> None:
    pruners = {"Grip": "grip", "warm-up only": f"grip:scorer={sys.argv[1]}", "divprune": "divprune", "norm": "norm"}
    quiet()
    model, processor = load_model("lab")
    tasks = {task.name.removeprefix("lab/"): task for task in get_tasks("lab")}
    chosen = []
    for image in IMAGES:
        for family in FAMILIES:
            mine = [s for s in tasks[family].samples if s.image_id == image]
            chosen += mine[:1]
    font, small = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    columns = [(name, keep) for name in pruners for keep in KEEPS]
    sheet = Image.new("RGB", (LEFT + CELL * len(columns), TOP + CELL * len(chosen)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, sample in enumerate(chosen):
        y = TOP + row * CELL
        inputs = make_inputs(model, processor, [sample.question], [sample.image])
        encoded = encode(model, inputs)
        cells = geometry(processor, sample.image.size, encoded.samples[0][0].grid)
        text, lines = sample.question, []
        while text:
            cut = len(text) if small.getlength(text) < LEFT - 175 else text.rfind(" ", 0, 26)
            lines.append(text[:cut])
            text = text[cut:].strip()
        sheet.paste(sample.image.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS), (2, y + 2))
        pen.multiline_text((CELL + 6, y + 8), "\n".join([*lines, "", f"right: {sample.answer}"]), "black", small)
        for column, (name, keep) in enumerate(columns):
            x = LEFT + column * CELL
            if row == 0:
                pen.text((x + 6, 8), f"{name} {100 * keep:g} %", "black", font if len(name) < 8 else small)
            ids = question_ids(processor, [sample.question])
            out = answer(
                model, processor, inputs, pruners[name], keep, max_new_tokens=12, question=ids, encoded=encoded
            )
            picture = overlay(sample.image, out.selections[0][0], cells)
            square = picture.crop((0, 0, picture.width, picture.width))  # without its caption
            sheet.paste(square.resize((CELL - 24, CELL - 24), Image.Resampling.LANCZOS), (x + 2, y + 2))
            right = out.predictions[0] == sample.answer
            pen.text((x + 4, y + CELL - 20), out.predictions[0], "#00703c" if right else "#b00020", small)
    target = Path(__file__).parent.parent / "docs" / "grip-tokens.png"
    sheet.save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main()
