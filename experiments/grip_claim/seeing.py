"""Writes the questions of a file that the model cannot answer without their image: the blind test of CaCoVID.

    python -m experiments.grip_claim.seeing WORK/dense-train/questions.jsonl WORK/dense-seeing

The new folder has questions.jsonl alone; its rows name the pictures where they are. It costs one short generation a
question, without a visual token.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from gripvlm import lab
from gripvlm.eval import answer, make_inputs
from gripvlm.tasks import JsonlTask
from gripvlm.utils import disk


def not_blind(model: Any, processor: Any, file: Path, batch_size: int = 64) -> list[dict[str, Any]]:
    """The rows of a questions file whose answer needs the image."""
    task, kept = JsonlTask(file), []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for start in range(0, len(rows), batch_size):
        samples = task.samples[start : start + batch_size]
        inputs = make_inputs(model, processor, [task.prompt(sample) for sample in samples], None)
        said = answer(model, processor, inputs, None, max_new_tokens=task.max_new_tokens).predictions
        right = [task.score(text, sample) == 1 for text, sample in zip(said, samples, strict=True)]
        kept += [row for row, blind in zip(rows[start : start + batch_size], right, strict=True) if not blind]
    return kept


def write(rows: list[dict[str, Any]], source: Path, folder: Path) -> None:
    """Rows of a file in another folder; their pictures stay where they are."""
    way = Path(os.path.relpath(source.parent, folder))
    for row in rows:
        images = row["image"]
        row["image"] = [str(way / name) for name in images] if isinstance(images, list) else str(way / images)
    disk.write(folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="lab-dense")
    given = parser.parse_args()
    rows = not_blind(*lab.load(given.model), given.file)
    write(rows, given.file, given.out)
    print(f"{len(rows)} questions need their image: {given.out / 'questions.jsonl'}")


if __name__ == "__main__":
    main()
