"""One step of every training stage for a frozen model of 7B, with its peak memory: a part of `runs/gpu_checks.py`.

Stages that the memory does not hold with the default batch are tried again with a smaller one. The model and the
questions are random: what is measured is time and memory, not learning.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gripvlm.bench import random_model
from gripvlm.errors import GripError
from gripvlm.eval import environment
from gripvlm.grip.train import TrainConfig, train
from tiny_train import asked, processor_of, tiny_vlm

__all__ = ["train_steps"]


def train_steps(options: argparse.Namespace, ends: float, write: Callable[[Any], None]) -> int:
    """0 where nothing failed for another reason than memory or time. `write` gets the result after every step."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.train == "tiny":
        model, processor = tiny_vlm()
        model.to(device, dtype)
    else:
        model = random_model(options.train, device, dtype)
        processor = processor_of(model)
    memory: Any = torch.cuda if device.type == "cuda" else None
    result: dict[str, Any] = {
        "schema": "gripvlm.gpu_train/1",
        "environment": environment(),
        "model": options.train,
        "steps": [],
    }
    result |= {"weights_gib": sum(p.nbytes for p in model.parameters()) / 2**30, "finished": False}
    seen = set()
    relaxed = ("soft_topk", "straight_through", "perturbed", "dynamicvit", "diffprune")
    stages = [
        ("warmup", {"teacher": "gradient"}),
        ("grpo", {}),
        *[("relaxed", {"relaxation": kind}) for kind in relaxed],
    ]
    stages.insert(2, ("warmup", {"teacher": "attention"}))
    for images, questions in ((4, 4), (1, 4), (1, 1)):
        for stage, more in stages:
            label = f"{stage} {next(iter(more.values()), '')}".strip()
            if label in seen:
                continue
            if time.monotonic() > ends - 5:
                print("time is over")
                return 0
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(
                    out=folder,
                    stage=stage,
                    steps=1,
                    warmup_steps=1,
                    images=images,
                    questions=questions,
                    reward="log_prob",
                    val_keeps="0.11",
                    val_questions=1,
                    **more,
                )
                gc.collect()
                if memory:
                    memory.empty_cache()
                    memory.reset_peak_memory_stats()
                began, why, memory_over = time.monotonic(), "", False
                try:
                    train(config, model, processor, data=asked(images, questions), validation=asked(1, 1, "held"))
                except (GripError, RuntimeError, TypeError, ValueError) as error:  # the other stages go on
                    cause = error.__cause__ or error
                    why, memory_over = str(cause).partition("\n")[0][:300], isinstance(cause, torch.OutOfMemoryError)
                    if not memory_over:
                        traceback.print_exc()
                    del cause  # it holds the frames, and they hold the tensors
                log = Path(folder) / "metrics.jsonl"
                lines = log.read_text().splitlines() if log.exists() else []
                minutes = [line["minutes"] for line in map(json.loads, lines) if line.get("val") and line["step"] == 1]
            peak = memory.max_memory_allocated() / 2**30 if memory else None
            step = {
                "stage": stage,
                **more,
                "images": images,
                "questions": questions,
                "out_of_memory": memory_over,
                "failed": why or None,
            }
            step |= {"seconds": time.monotonic() - began, "step_minutes": minutes, "peak_gib": peak}
            result["steps"].append(step)
            write(result)
            print(f"{label:<28} {images} x {questions}: {step['seconds']:.1f} s, peak {peak} GiB {why}")
            if not memory_over:
                seen.add(label)
    result["finished"] = True
    write(result)
    return int(any(step["failed"] and not step["out_of_memory"] for step in result["steps"]))
