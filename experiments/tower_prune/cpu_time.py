"""End to end on a CPU, by the CPU time of one thread: results/cpu_NAME.json.

python -m experiments.tower_prune.cpu_time llava-0.5b|qwen2.5-vl-0.5b [TURNS]

Models have the published widths, random weights, and a quarter of the depth of both halves, so that a busy machine
gets through them; ratios of time are those of full depth but for what is there once (patch embedding, projector, head).
CPU time and not the clock, since other work runs on the machine; settings are interleaved, forwards and backwards.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gripvlm.bench.measure import Cell
from gripvlm.bench.roofline import flop_counter
from gripvlm.bench.runner import settings_of, turns
from gripvlm.bench.shapes import Architecture, architecture, random_prompts
from gripvlm.budget import Budget
from gripvlm.eval.environment import command_line, git_state, hardware, versions
from gripvlm.pruners import get_pruner
from gripvlm.utils import timing

HERE = Path(__file__).parent
TEXT, NEW = 32, 2
PICTURE = 448  # pixels of the Qwen model's picture: 1,024 patches, 256 visual tokens
RUNS = {
    "llava-0.5b": ["divprune", "tower(norm,divprune):block=1,tower_keep=25%", "tower(norm):block=1,tower_keep=10%"],
    "qwen2.5-vl-0.5b": ["divprune", "tower(norm,divprune):block=1,tower_keep=25%"],
}
KEEP = "10%"


def shape_of(name: str) -> Architecture:
    """A quarter of the depth; for Qwen the tower of Qwen2.5-VL in front of Qwen2-0.5B."""
    small = architecture("llava-0.5b")
    found = copy.deepcopy(small if name == "llava-0.5b" else architecture("qwen2.5-vl-7b"))
    vision, text = found.config["vision_config"], found.config["text_config"]
    if name == "llava-0.5b":
        vision["num_hidden_layers"] = 6
        # LLaVA reads the last block but one: of 24 blocks one is for nothing, of 6 it would be a larger share.
        found.config["vision_feature_layer"] = -1
    else:
        wide = {n: v for n, v in small.config["text_config"].items() if n not in ("model_type", "vocab_size")}
        text |= wide | {"rope_parameters": text["rope_parameters"] | {"mrope_section": [8, 12, 12]}}
        vision |= {"depth": 8, "fullatt_block_indexes": [1, 3, 5, 7], "out_hidden_size": text["hidden_size"]}
    text["num_hidden_layers"] = 6
    return found


def main(name: str, repeats: int) -> None:
    timing.time = type("clock", (), {"perf_counter": staticmethod(time.process_time)})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = shape_of(name)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(shape.model_type, **shape.config)).eval()
    inputs = random_prompts(model, shape, 1, TEXT, PICTURE)
    settings = settings_of([(spec, get_pruner(spec)) for spec in RUNS[name]], [Budget(KEEP)])
    cell = Cell(model, inputs, [Budget(KEEP)], NEW)
    runs: dict[str, list[dict[str, float]]] = {setting.name: [] for setting in settings}
    content: dict[str, Any] = {
        "command": command_line(),
        "environment": {"versions": versions(), "hardware": hardware(model.device), "git": git_state()},
        "model": {"name": name, "depth": "a quarter", "parameters": sum(p.numel() for p in model.parameters())},
        "clock": "CPU time of the process, one thread, float32",
        "visual_tokens": sum(cell.sizes),
        "text": TEXT,
        "new": NEW,
        "rows": [],
    }
    for turn, setting in turns(settings, repeats):
        with flop_counter() as meter:
            seconds, _ = cell.timed(setting)
        runs[setting.name].append({"turn": turn, "flops": meter.get_total_flops(), **seconds})
        print(setting.name, {n: round(v, 3) for n, v in seconds.items()}, flush=True)
        content["rows"] = [setting.columns | {"runs": runs[setting.name]} for setting in settings]
        out = HERE / "results" / f"cpu_{name}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)
