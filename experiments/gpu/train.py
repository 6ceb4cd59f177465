"""One step of each training stage for a frozen model of 7B with random weights: time and peak memory, not learning.

    python -m experiments.gpu.train llava-1.5-7b cuda OUT.json     tests/ must be on PYTHONPATH

A stage that runs out of memory is tried again with a smaller batch.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gripvlm.bench import random_model
from gripvlm.eval import environment
from gripvlm.grip.train import TrainConfig, train
from tiny_train import asked, processor_of, tiny_vlm

STAGES = {"gradient": ("warmup", {"teacher": "gradient"}), "grpo": ("grpo", {})}
STAGES["attention"] = ("warmup", {"teacher": "attention"})


def step(model: Any, processor: Any, stage: str, settings: dict[str, Any], images: int, questions: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings | {"images": images, "questions": questions, "val_keeps": "0.11", "val_questions": 1}
        config = TrainConfig(out=folder, stage=stage, steps=1, warmup_steps=1, reward="log_prob", **settings)
        train(config, model, processor, data=asked(images, questions), validation=asked(1, 1, "held"))


def main() -> None:
    name, device, out = sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3])
    if name == "tiny":
        model, processor = tiny_vlm()
        model.to(device, torch.bfloat16)
    else:
        model = random_model(name, device, torch.bfloat16)
        processor = processor_of(model)
    gib = sum(weight.nbytes for weight in model.parameters()) / 2**30
    result: dict[str, Any] = {"schema": "gripvlm.gpu_train/2", "environment": environment(), "model": name}
    result |= {"weights_gib": gib, "steps": []}
    for label, (stage, settings) in STAGES.items():
        for images, questions in ((4, 4), (1, 4), (1, 1)):
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began, full = time.monotonic(), False
            try:
                step(model, processor, stage, settings, images, questions)
            except torch.OutOfMemoryError:
                full = True
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            row = {"stage": stage, **settings, "images": images, "questions": questions, "out_of_memory": full}
            result["steps"].append(row | {"seconds": time.monotonic() - began, "peak_gib": peak})
            out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{label}, {images} x {questions}: peak {peak} GiB{', out of memory' if full else ''}")
            if not full:
                break


if __name__ == "__main__":
    main()
