"""A page through a model of Qwen2.5-VL's layout: processor time from pixels to the last token, with repeats merged, and
how far the rows that are left are from those of a tower that sees all cells.

    python -m experiments.repeats.speed     writes results/speed.json; some minutes on one CPU core

The model has random weights and is far smaller than any that is published: 4 vision blocks of 320 channels, the last
with full attention as every fourth of Qwen2.5-VL's, and 4 language layers of 512. Settings run in alternating order.
Times are processor times of this process, whatever else the machine does. FLOPs are counted by torch, in a run of
their own.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from experiments.repeats.documents import draw
from experiments.results import STUDIES, write_json
from gripvlm import encode, prune_inputs, pruned_run
from gripvlm.bench.roofline import flop_counter
from gripvlm.eval.environment import git_state, hardware, versions

VISION = {
    "hidden_size": 320,
    "intermediate_size": 856,
    "depth": 4,
    "num_heads": 5,
    "out_hidden_size": 512,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [3],
}
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2752,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
}
MARKS = {"image_token_id": 990, "video_token_id": 991, "vision_start_token_id": 992, "vision_end_token_id": 993}
SETTINGS: dict[str, tuple[str, float]] = {
    "all tokens": ("full", 1.0),
    "divprune at 50 %": ("divprune", 0.5),
    "repeats": ("repeats(full)", 1.0),
    "repeats, then divprune at 50 % of the rest": ("repeats(divprune)", 0.5),
}
KINDS = ("page, one column",)
MEGAPIXELS, NEW, REPEATS = 1.0, 8, 2


def model_and_inputs(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    config = AutoConfig.for_model("qwen2_5_vl", vision_config=VISION, text_config=TEXT, **MARKS)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    inputs = dict(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 16_777_216})(
            draw(kind, MEGAPIXELS, 0), return_tensors="pt"
        )
    )
    cells = int(inputs["image_grid_thw"].prod()) // 4
    words = torch.randint(3, 900, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([[1, 992, *[990] * cells, 993, *words]])
    types = (ids == 990).long()
    return model, inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any], spec: str, keep: float, clock: Any) -> dict[str, float]:
    """What a meter says of each phase."""
    began = clock()
    with pruned_run(model, inputs, spec, keep) as (arguments, record):
        ready = clock()
        model.generate(**arguments, max_new_tokens=NEW, do_sample=False)
        ended = clock()
    seen = {"to the prefill": ready - began, "language model": ended - ready, "whole": ended - began}
    return seen | {"kept": record.kept, "of": record.total}


@torch.no_grad()
def difference(model: Any, inputs: dict[str, Any], spec: str) -> float:
    """Of the rows that are left, relative to what a tower that sees all cells makes of them (L2 norms)."""
    arguments, record = prune_inputs(model, inputs, spec, 1.0, return_record=True)
    rows = arguments["mm_encoder_outputs"]["image"].pooler_output[0]
    full = encode(model, inputs).samples[0][0].features[record.selections[0][0].indices]
    return float((rows - full).norm() / full.norm())


def main() -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = {
        "command": "python -m experiments.repeats.speed",
        "git": git_state(),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "model": {"vision": VISION, "text": TEXT, "weights": "random", "dtype": "float32", "threads": 1},
        "protocol": {"megapixels": MEGAPIXELS, "new": NEW, "repeats": REPEATS, "order": "alternating"},
        "rows": [],
        "differences": [],
    }
    for kind in KINDS:
        model, inputs = model_and_inputs(kind)
        counted, times = {}, {name: [] for name in SETTINGS}
        for name, (spec, keep) in SETTINGS.items():  # warms up, too
            with flop_counter() as meter:
                counted[name] = run(model, inputs, spec, keep, meter.get_total_flops)
        for turn in range(REPEATS):
            for name in list(SETTINGS) if turn % 2 else list(SETTINGS)[::-1]:
                times[name].append(run(model, inputs, *SETTINGS[name], time.process_time))
                print(kind, turn, name, times[name][-1], flush=True)
        for name, seen in times.items():
            row: dict[str, Any] = {"kind": kind, "setting": name, "kept": seen[0]["kept"], "of": seen[0]["of"]}
            for part in ("to the prefill", "language model", "whole"):
                row[part] = {
                    "seconds": median(each[part] for each in seen),
                    "of_all": median(a[part] / b[part] for a, b in zip(seen, times["all tokens"], strict=True)),
                    "of_all_each": [a[part] / b[part] for a, b in zip(seen, times["all tokens"], strict=True)],
                    "flops": counted[name][part],
                    "flops_of_all": counted[name][part] / counted["all tokens"][part],
                }
            content["rows"].append(row)
        for spec in ("repeats(full)", "repeats(full):counted=False"):
            content["differences"].append({"kind": kind, "spec": spec, "relative": difference(model, inputs, spec)})
    write_json(STUDIES / "repeats/results/speed.json", content)


if __name__ == "__main__":
    sys.exit(main())
