"""Questions of the lab's training or validation split as a folder that `gripvlm train --data` takes.

    python -m gripvlm.lab.dataset OUT --split train --pictures 4000

Needs `pip install gripvlm[lab]`. Artwork, typefaces and backgrounds differ between the splits, and so do the seeds.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gripvlm.lab import art
from gripvlm.lab.export import write_questions

FIRST = {"train": 300_000, "val": 400_000, "test": 500_000}
"""Seeds that neither the VLM's own training nor the shipped sample uses."""


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
