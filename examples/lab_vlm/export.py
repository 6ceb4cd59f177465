"""Stage 3 of the lab's recipe: the trained model and a sample of the test split as a folder.

    python -m lab_vlm.export OUT FOLDER --reader longer

FOLDER gets `model/`, which transformers loads, and `sample/`, questions about pictures of the test split.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gripvlm.utils import disk

from .dataset import write_questions
from .train_reader import load_tagger
from .vlm import build_model, build_processor

PICTURES = 160
FIRST_SEED = 50_000


def export_model(out: Path, reader: str, folder: Path) -> None:
    model = build_model(load_tagger(out).tower.config)
    model.load_state_dict(torch.load(out / f"{reader}.pt", weights_only=False)["model"])
    write_model(model, build_processor(), folder)


def write_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Half-precision safetensors whose config asks for float32, as processors without half units need."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # may be written for its owner alone
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    disk.write(path, json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the training folder, with tower.pt and the reader's checkpoint")
    parser.add_argument("folder", type=Path, help="its model/ and sample/ are replaced")
    parser.add_argument("--reader", default="reader")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="in the sample; 0 leaves it as it is")
    args = parser.parse_args()
    export_model(args.out, args.reader, args.folder / "model")
    if args.pictures:
        shutil.rmtree(args.folder / "sample", ignore_errors=True)
        write_questions(args.folder / "sample", "test", FIRST_SEED, args.pictures)


if __name__ == "__main__":
    main()
