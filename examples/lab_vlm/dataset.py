"""Questions of one of the lab's splits (art.SPLITS) as a folder that `gripvlm train --data` takes.

    python -m lab_vlm.dataset OUT --split train --pictures 4000

Artwork, typefaces and backgrounds differ between the splits, and so do the seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from gripvlm.utils import disk

from . import art
from .compose import compose
from .questions import Question, ask
from .scenes import GRID

SHARE = {"existence": 4, "perception": 4, "science": 3, "diagram": 3, "reading": 3, "text": 2}
"""Questions a picture, by family."""

FIRST = {"train": 300_000, "val": 400_000, "test": 500_000, "scorer": 600_000}
"""Seeds that neither the VLM's own training nor the shipped sample uses."""


def pick(questions: list[Question], rng: np.random.Generator) -> list[Question]:
    """A few questions a family; existence half yes and half no, perception in whole pairs.

    "Is there a cat?" is asked about the smaller half of what is in the picture: large things are found by any few
    tokens, so they tell no pruner from another.
    """
    chosen: list[Question] = []
    for family, count in SHARE.items():
        pool = [q for q in questions if q.family == family]
        if family == "existence":
            for answer in ("yes", "no"):
                half = [q for q in pool if q.answer == answer]
                if answer == "yes":
                    half = sorted(half, key=lambda q: float(q.evidence.sum()))[: max(2, len(half) // 2)]
                chosen += [half[i] for i in rng.permutation(len(half))[: count // 2]]
        elif family == "perception":
            kinds = sorted({q.kind for q in pool})
            for kind in rng.permutation(kinds)[: count // 2]:  # two kinds, one pair of each
                pairs = sorted({q.pair for q in pool if q.kind == kind})
                pair = pairs[rng.integers(len(pairs))]
                chosen += [q for q in pool if q.pair == pair]
        else:
            chosen += [pool[i] for i in rng.permutation(len(pool))[:count]]
    return chosen


def write_questions(folder: Path, split: str, first: int, pictures: int, before: str = "") -> int:
    """Writes `questions.jsonl` and `images/` of scenes first, first + 1, ...; returns how many questions there are.

    `before` is put in front of the images' names, for readers that look beside questions.jsonl.
    """
    (folder / "images").mkdir(parents=True)
    rows: list[str] = []
    for i in range(pictures):
        seed = first + i
        scene = compose(seed, split)
        rng = np.random.default_rng((23, seed))
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "WEBP", lossless=True, quality=75, method=4 if split == "test" else 0)
        name = f"{i:04d}.webp"
        disk.write(folder / "images" / name, buffer.getvalue())
        questions = ask(scene, split, np.random.default_rng((17, art.SPLITS.index(split), seed)))
        for j, q in enumerate(pick(questions, rng)):
            order = [int(c) for c in np.argsort(-q.evidence, kind="stable") if q.evidence[c] > 0.15]
            row: dict[str, object] = {
                "id": f"{i:04d}-{j:02d}",
                "image": before + name,
                "family": q.family,
                "kind": q.kind,
            }
            row |= {"question": q.question, "answer": q.answer, "choices": list(q.choices)}
            row |= {"pair": None if q.pair < 0 else f"{i:04d}-{q.pair}", "evidence": order}
            if before and not rows:
                row["evidence_grid"] = [GRID, GRID]
            rows.append(json.dumps(row))
        if sys.stderr.isatty() and i % 100 == 99:
            print(f"\r{i + 1} of {pictures} pictures", end="", file=sys.stderr, flush=True)
    disk.write(folder / "questions.jsonl", "\n".join(rows) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder; questions.jsonl and images/ are written there")
    parser.add_argument("--split", choices=art.SPLITS, default="train")
    parser.add_argument("--pictures", type=int, default=4000)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: name a new folder, or remove it")
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    count = write_questions(part, args.split, FIRST[args.split], args.pictures, "images/")
    part.rename(args.out)
    print(f"{count} questions about {args.pictures} pictures: {args.out / 'questions.jsonl'}")


if __name__ == "__main__":
    main()
