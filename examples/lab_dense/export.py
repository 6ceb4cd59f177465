"""Stage 3 of `lab-dense`: the trained model, and questions of the test split, as a folder.

    python -m lab_dense.export OUT FOLDER

FOLDER gets `model/`, which transformers loads, and `sample/`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from lab_vlm.export import write_model

from . import features
from .dataset import write_questions
from .questions import FAMILIES
from .vlm import build_model, build_processor


def export_model(out: Path, reader: str, folder: Path) -> None:
    state = torch.load(out / f"{reader}.pt", weights_only=False)
    model = build_model(state["recipe"]["layers"])
    model.model.vision_tower = features.load_tower(out)
    model.load_state_dict(state["model"])
    write_model(model, build_processor(), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the training folder, with tower.pt and the reader's checkpoint")
    parser.add_argument("folder", type=Path, help="its model/ and sample/ are replaced")
    parser.add_argument("--reader", default="reader")
    parser.add_argument("--groups", type=int, nargs=3, default=(300, 100, 60), metavar="N", help="0 0 0: no sample")
    parser.add_argument("--families", default=",".join(FAMILIES))
    args = parser.parse_args()
    export_model(args.out, args.reader, args.folder / "model")
    if sum(args.groups):
        shutil.rmtree(args.folder / "sample", ignore_errors=True)
        write_questions(args.folder / "sample", "test", args.groups, args.families.split(","), quality=80)


if __name__ == "__main__":
    main()
