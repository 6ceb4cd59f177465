"""A pool of rendered scenes on disk, in shards: pictures, patch labels and questions, made once and reused.

    python -m lab_vlm.pool OUT --split train --scenes 40000 --workers 2

Shards that exist are kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from gripvlm.utils import disk

from . import art
from .compose import compose
from .questions import Question, ask
from .scenes import CHARACTERS, DEVICES, GRID, SIZE, Scene

SHARD = 1000

CLASS_NAMES: tuple[str, ...] = ("", "other", *art.CLASSES, *DEVICES, *CHARACTERS, "arrow")
COLOUR_NAMES: tuple[str, ...] = ("", *art.COLOURS)
LINK_NAMES: tuple[str, ...] = ("", "word", "number", "label", *art.CLASSES, *CHARACTERS)
NEXT_NAMES: tuple[str, ...] = ("", *art.CLASSES)
STATE_NAMES: tuple[str, ...] = ("", *(f"{d}:{s}" for d, states in DEVICES.items() for s in states))
INDEX_NAMES: tuple[str, ...] = ("", "0", "1", "2", "3")
SIZE_NAMES: tuple[str, ...] = ("", "small", "big")
# the tower's targets, in the order of the label planes
HEADS: dict[str, tuple[str, ...]] = {
    "cls": CLASS_NAMES,
    "colour": COLOUR_NAMES,
    "link": LINK_NAMES,
    "nxt": NEXT_NAMES,
    "state": STATE_NAMES,
    "index": INDEX_NAMES,
    "size": SIZE_NAMES,
}


def labels(scene: Scene) -> np.ndarray:
    """Target class of every head for every patch, uint8 [heads, GRID * GRID]; 0 is 'nothing of the kind'."""
    table = np.zeros((len(scene.parts) + 1, len(HEADS)), dtype=np.uint8)
    for i, part in enumerate(scene.parts):
        state = f"{part.cls}:{part.state}" if part.state else ""
        size = "" if part.big < 0 else SIZE_NAMES[1 + part.big]
        index = "" if part.index < 0 else str(part.index)
        values = (part.cls, part.colour, part.link, part.nxt, state, index, size)
        table[i] = [names.index(v) for names, v in zip(HEADS.values(), values, strict=True)]
    return table[scene.owners().reshape(-1)].T  # -1 takes the last, all-zero row


def make_shard(path: Path, split: str, start: int, count: int = SHARD) -> None:
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    planes = np.empty((count, len(HEADS), GRID * GRID), dtype=np.uint8)
    questions: list[list[Question]] = []
    for i in range(count):
        seed = start + i
        scene = compose(seed, split)
        images[i], planes[i] = scene.image, labels(scene)
        of_scene = ask(scene, split, np.random.default_rng((17, art.SPLITS.index(split), seed)))
        for question in of_scene:
            question.evidence = (question.evidence * 255).astype(np.uint8)
        questions.append(of_scene)
    disk.write(path, pickle.dumps({"images": images, "labels": planes, "questions": questions}, protocol=5))


def _job(make: Callable[[Path, str, int, int], None], job: tuple[Path, str, int, int]) -> None:
    make(*job)


def shards(folder: Path, split: str) -> list[Path]:
    return sorted(Path(folder).glob(f"{split}-*.pkl"))


def load_shard(path: Path) -> dict:
    with path.open("rb") as f:
        return pickle.load(f)


def build(
    folder: Path,
    split: str,
    scenes: int,
    workers: int,
    make: Callable[[Path, str, int, int], None] = make_shard,
) -> None:
    """`make(path, split, first seed, count)` writes each shard that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, scenes, SHARD)
    jobs = [(folder / f"{split}-{start:07d}.pkl", split, start, min(SHARD, scenes - start)) for start in starts]
    jobs = [job for job in jobs if not job[0].exists()]
    with multiprocessing.Pool(workers) as pool:
        for done, _ in enumerate(pool.imap_unordered(partial(_job, make), jobs), 1):
            print(f"pool {split}: {done}/{len(jobs)} shards", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train", choices=art.SPLITS)
    parser.add_argument("--scenes", type=int, default=40000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    build(args.out, args.split, args.scenes, args.workers)


if __name__ == "__main__":
    main()
