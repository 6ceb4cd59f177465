"""Visual tokens that are left of documents once repeats are merged, by kind, size, file format and threshold.

    python -m experiments.repeats.measure     writes results/tokens.json; a few minutes on a CPU

Pictures go through the processors of transformers as those of Qwen2.5-VL (a visual token for 28 x 28 pixels) and
Qwen3-VL (32 x 32) are configured. No model runs.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from experiments.repeats.documents import KINDS, draw
from experiments.results import STUDIES, write_json
from gripvlm.eval.environment import git_state, hardware, versions
from gripvlm.models.repeats import distinct_cells

SIZES, SEEDS, MIDDLE = (1.0, 2.0, 4.0), (0, 1), 2.0
FILES = {"PNG": None, "JPEG 90": 90}
"""Name -> the quality of the JPEG that pictures go through."""
LEVELS = (0, 4, 16)
"""Thresholds, in steps of 256; all of them, the second file format and the second family at the middle size only."""
LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 16_777_216}
PROCESSORS = {
    "Qwen2.5-VL": {"patch_size": 14},
    "Qwen3-VL": {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}


def row(kind: str, megapixels: float, seed: int, family: str = "Qwen2.5-VL", file: str = "PNG") -> dict[str, Any]:
    """The measurements of one picture."""
    processor = Qwen2VLImageProcessorPil(size=LIMITS, **PROCESSORS[family])
    inputs = processor(draw(kind, megapixels, seed, FILES[file]), return_tensors="pt")
    _, h, w = inputs["image_grid_thw"][0].tolist()
    cells = inputs["pixel_values"].reshape(1, h // 2, w // 2, -1)
    made: dict[str, Any] = {"kind": kind, "megapixels": megapixels, "family": family, "file": file, "seed": seed}
    made |= {"cells": h * w // 4, "left": {}, "seconds": {}}
    # The largest of the three channels' scales, so that no channel may differ by more.
    step = 1 / 255 / min(processor.image_std)
    for levels in LEVELS if megapixels == MIDDLE and family == "Qwen2.5-VL" else LEVELS[:1]:
        began = time.process_time()
        # half a step more: pixels are floats by now
        found = distinct_cells(cells, (levels + 0.5) * step if levels else 0)
        made["seconds"][levels] = time.process_time() - began
        made["left"][levels] = len(found.rows)
    if megapixels == MIDDLE:
        # By a hash of its bits: a cell is some thousands of numbers.
        made["unique"] = len({hash(cell.tobytes()) for cell in cells.flatten(0, 2).numpy()})
    return made


def main() -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = {
        "command": "python -m experiments.repeats.measure",
        "git": git_state(),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "rows": [],
    }
    wanted = [(size, seed, "Qwen2.5-VL", "PNG") for size in SIZES for seed in SEEDS]
    wanted += [(MIDDLE, seed, "Qwen2.5-VL", "JPEG 90") for seed in SEEDS] + [(MIDDLE, 0, "Qwen3-VL", "PNG")]
    for kind in KINDS:
        for which in wanted:
            content["rows"].append(row(kind, *which))
            print(*which, kind, content["rows"][-1]["left"], flush=True)
    write_json(STUDIES / "repeats/results/tokens.json", content)


if __name__ == "__main__":
    sys.exit(main())
