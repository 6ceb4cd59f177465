"""Questions about boards of one split as a folder that `gripvlm train --data` and `--tasks jsonl:` take.

    python -m lab_dense.dataset OUT --split scorer --groups 500 160 80

Groups of one, two and four boards; a question shows all boards of its group, and no board is in two groups, so that
intervals can be clustered by group. No artwork, typeface, photograph or seed is in two splits.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gripvlm.utils import disk
from lab_vlm import art

from .boards import GRID, Board, Facts, compose, units
from .questions import FAMILIES, OF_SEVERAL, Question, Things, ask, order

FIRST = {"train": 300_000, "val": 400_000, "test": 500_000, "scorer": 600_000}
"""First seed of each split, far from those of the VLM's own training (pool.py)."""

ASKED = {1: 2, 2: 1, 4: 2}
"""Questions a family about a group, by its number of boards; families about several boards ask twice as many."""


def pick(boards: Sequence[Things], families: Sequence[str], seed: Sequence[int]) -> list[Question]:
    """A few different questions a family about one group; a family's do not depend on which others are asked."""
    questions: list[Question] = []
    for family in families:
        rng = np.random.default_rng((*seed, zlib.crc32(family.encode())))
        count = ASKED[len(boards)] * (2 if family in OF_SEVERAL else 1)
        different: dict[str, Question] = {}
        for _ in range(4 * count):
            question = ask(boards, family, rng)
            if question is not None and len(different) < count:
                different.setdefault(question.question, question)
        questions += different.values()
    return questions


def encode(board: Board, quality: int) -> bytes:
    """The picture as WebP; quality 0 is lossless."""
    buffer = io.BytesIO()
    options = {"quality": quality, "method": 6} if quality else {"lossless": True, "method": 0}
    Image.fromarray(board.scene.image).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def write_questions(
    folder: Path, split: str, groups: Sequence[int], families: Sequence[str], before: str = "", quality: int = 0
) -> int:
    """Writes `questions.jsonl` and `images/`; returns how many questions there are.

    groups: how many groups of one, two and four boards. `before` is put in front of the images' names, for readers
    that look beside questions.jsonl.
    """
    (folder / "images").mkdir(parents=True)
    rows: list[str] = []
    seed = FIRST[split]
    sizes = [size for size, count in zip((1, 2, 4), groups, strict=True) for _ in range(count)]
    for number, size in enumerate(sizes):
        boards = [compose(seed + i, split) for i in range(size)]
        seed += size
        facts = [Facts(b.things, b.centre, units(b)) for b in boards]
        names = []
        for i, board in enumerate(boards):
            names.append(f"{number:04d}{'abcd'[i] if size > 1 else ''}.webp")
            disk.write(folder / "images" / names[-1], encode(board, quality))
        picked = pick([Things(f) for f in facts], families, (23, art.SPLITS.index(split), number))
        for j, q in enumerate(picked):
            images = [before + name for name in names]
            row: dict[str, object] = {"id": f"{number:04d}-{j:02d}", "image": images if size > 1 else images[0]}
            row |= {"family": q.family, "kind": q.kind, "question": q.question, "answer": q.answer}
            row |= {"choices": list(q.choices), "evidence": order(q, facts)}
            if before and not rows:
                row["evidence_grid"] = [GRID, GRID]
            rows.append(json.dumps(row))
        if number % 100 == 99:
            print(f"{number + 1} of {len(sizes)} groups", file=sys.stderr, flush=True)
    disk.write(folder / "questions.jsonl", "\n".join(rows) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder; questions.jsonl and images/ are written there")
    parser.add_argument("--split", choices=art.SPLITS, default="scorer")
    parser.add_argument(
        "--groups", type=int, nargs=3, default=(500, 160, 80), metavar="N", help="groups of one, two and four boards"
    )
    parser.add_argument("--families", default=",".join(FAMILIES), help="which ask, separated by commas")
    parser.add_argument("--quality", type=int, default=0, help="of the WebP pictures; 0 is lossless")
    args = parser.parse_args()
    families = args.families.split(",")
    if unknown := set(families) - set(FAMILIES):
        raise SystemExit(f"no family {', '.join(sorted(unknown))}: choose from {', '.join(FAMILIES)}")
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: name a new folder, or remove it")
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    count = write_questions(part, args.split, args.groups, families, "images/", args.quality)
    part.rename(args.out)
    print(f"{count} questions in {sum(args.groups)} groups: {args.out / 'questions.jsonl'}")


if __name__ == "__main__":
    main()
