"""Stage 3 of the lab's recipe: put the trained model and a sample of the test split into the package.

python -m gripvlm.lab.export OUT --reader reader
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gripvlm.lab import MODEL, SAMPLE, art
from gripvlm.lab.compose import compose
from gripvlm.lab.questions import Question, ask
from gripvlm.lab.scenes import GRID
from gripvlm.lab.train_reader import load_tagger
from gripvlm.lab.vlm import build_model, build_processor
from gripvlm.utils import disk

PICTURES = 160
FIRST_SEED = 50_000
SAMPLE_SHARE = {"existence": 4, "perception": 4, "science": 3, "diagram": 3, "reading": 3, "text": 2}


def export_model(out: Path, reader: str, folder: Path) -> None:
    """Half-precision safetensors whose config asks for float32, as processors without half units need."""
    model = build_model(load_tagger(out).tower.config)
    model.load_state_dict(torch.load(out / f"{reader}.pt", weights_only=False)["model"])
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    disk.write(path, json.dumps(config, indent=2) + "\n")


def pick(questions: list[Question], rng: np.random.Generator) -> list[Question]:
    """A few questions a family; existence half yes and half no, perception in whole pairs.

    "Is there a cat?" is asked about the smaller half of what is in the picture: large things are found by any few
    tokens, so they tell no pruner from another.
    """
    chosen: list[Question] = []
    for family, count in SAMPLE_SHARE.items():
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
    """`questions.jsonl` and `images/` of scenes first, first + 1, ...; returns how many questions there are.

    `before` is put in front of the images' names.
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
        asked = ask(scene, split, np.random.default_rng((17, art.SPLITS.index(split), seed)))
        for j, q in enumerate(pick(asked, rng)):
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the training folder, with tower.pt and the reader's checkpoint")
    parser.add_argument("--reader", default="reader")
    parser.add_argument("--model-folder", type=Path, default=MODEL)
    parser.add_argument("--no-sample", action="store_true", help="export the model only")
    args = parser.parse_args()
    export_model(args.out, args.reader, args.model_folder)
    if not args.no_sample:
        shutil.rmtree(SAMPLE, ignore_errors=True)
        write_questions(SAMPLE, "test", FIRST_SEED, PICTURES)


if __name__ == "__main__":
    main()
