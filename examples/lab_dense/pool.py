"""A pool of rendered boards on disk, in shards: pictures, patch labels and what is on them, made once and reused.

    python -m lab_dense.pool OUT --split train --boards 20000 --workers 2

Shards that exist are kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np

from gripvlm.utils import disk
from lab_vlm import art, pool
from lab_vlm.scenes import SIZE

from .boards import DIGITS, GRID, KINDS, Board, Facts, compose, units

HEADS: dict[str, tuple[str, ...]] = {
    **pool.HEADS,
    "index": ("", *"01234567"),
    "kind": ("", *KINDS),
    "tens": ("", *DIGITS),
    "units": ("", *DIGITS),
}
"""The tower's targets, in the order of the label planes: the first lab's, and what every patch of a number says."""

UNKNOWN = 255
"""A label that a scene of the first lab does not give."""


def labels(board: Board) -> np.ndarray:
    """Target class of every head for every patch, uint8 [heads, GRID * GRID]; 0 is 'nothing of the kind'."""
    parts = board.scene.parts
    table = np.zeros((len(parts) + 1, len(HEADS)), dtype=np.uint8)
    for i, part in enumerate(parts):
        kind, name, _ = board.things[part.thing]
        value = {"cls": part.cls, "colour": part.colour, "kind": kind}
        if kind == "sign":
            value["index"] = str(part.index)
        if kind == "number":
            value |= {"tens": name[0], "units": name[1]}
        table[i] = [names.index(value.get(head, "")) for head, names in HEADS.items()]
    return table[board.scene.owners().reshape(-1)].T


def first_lab_labels(planes: np.ndarray) -> np.ndarray:
    """Label planes of the first lab's scenes, [..., its heads, patches], with UNKNOWN where they say nothing."""
    more = np.full((*planes.shape[:-2], len(HEADS) - len(pool.HEADS), planes.shape[-1]), UNKNOWN, np.uint8)
    return np.concatenate([planes, more], axis=-2)


def make_shard(path: Path, split: str, start: int, count: int) -> None:
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    planes = np.empty((count, len(HEADS), GRID * GRID), dtype=np.uint8)
    facts: list[Facts] = []
    for i in range(count):
        board = compose(start + i, split)
        images[i], planes[i] = board.scene.image, labels(board)
        facts.append(Facts(board.things, board.centre, units(board)))
    disk.write(path, pickle.dumps({"images": images, "labels": planes, "facts": facts}, protocol=5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train", choices=art.SPLITS)
    parser.add_argument("--boards", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    pool.build(args.out, args.split, args.boards, args.workers, make_shard)


if __name__ == "__main__":
    main()
