"""results/grip-speed.json: rollouts a second, as a share of the pure-prefill limit and against re-encoding.

    python runs/grip_speed.py                             a quiet machine; about ten minutes on two cores
    python runs/grip_speed.py --repeats 1 --out try.json  a try; --models lab leaves the larger model out

Groups of G = 16 subsets a question, on the lab VLM and on a model with random weights in the shape of CLIP-L/14-336
and Qwen2-0.5B, whose prompts begin with a system prompt as long as LLaVA-1.5's. Four things run in alternating order:

- rollouts: the training engine scores all subsets; pictures are encoded.
- limit: the frozen language model's forward alone on the same rows, lengths and micro-batches; embeddings (visual rows
  in place), masks, positions and a shared prefix's keys and values are made before the clock starts, and logits
  only of the forced answer.
- step: a whole training step: the pictures are read and encoded, the scorer runs and draws, the loss has a gradient.
- loop: one `prune_inputs` with its own encoding and one forward for each subset.

Ratios are taken turn by turn; low and high are quartiles. FLOPs for the scorer's share of a 7B model's prefill are
counted, not timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rollout_times import Group
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

from gripvlm import get_pruner, lab
from gripvlm.bench.shapes import random_model, random_pruner
from gripvlm.eval import environment
from gripvlm.eval.environment import command_line
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.grip.train import Engine
from gripvlm.tasks import get_tasks

GROUP = 16
LAB, RANDOM = "lab", "random:llava-0.5b"
SYSTEM = "is there a cat next to the dog? " * 4
"""36 tokens for the lab's tokenizer; LLaVA-1.5's system prompt has about as many."""
PLAN: dict[str, dict[str, Any]] = {
    LAB: {"keeps": (6, 26, 64), "questions": 16, "looped": 32, "repeats": 7},
    RANDOM: {"keeps": (17, 72, 144), "questions": 1, "looped": 1, "repeats": 3},
}


def loaded(name: str) -> tuple[Engine, Scorer]:
    """A frozen model's engine, and a scorer for it."""
    if name == LAB:
        return Engine(*lab.load()), get_pruner("grip").module
    model, words = random_model(name, torch.device("cpu"), torch.float32), AutoProcessor.from_pretrained(lab.MODEL)
    tokenizer = words.tokenizer
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=SYSTEM + words.chat_template,
    )
    return Engine(model, processor), random_pruner("grip", model).module


def measured(name: str, repeats: int | None) -> dict[str, Any]:
    """Everything about one model."""
    plan = PLAN[name]
    engine, scorer = loaded(name)
    task = get_tasks("lab/text")[0]
    by_image: dict[str, list] = {}
    for sample in task.samples:
        by_image.setdefault(sample.image_id, []).append((task, sample))
    questions = [pair for pairs in by_image.values() for pair in pairs][: plan["questions"]]
    found = {}
    for k in plan["keeps"]:
        group = Group(engine, scorer, questions, k, GROUP, plan["looped"])
        a, b = group.found[: plan["looped"]], group.loop()
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4), (a - b).abs().max()
        found[str(k)] = group.times(repeats or plan["repeats"])
        print(name, k, json.dumps(found[str(k)], indent=1))
    return {
        "visual_tokens": group.n,
        "questions": len(questions),
        "micro_batch": engine.rows,
        "repeats": repeats or plan["repeats"],
        "by_kept": found,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=list(PLAN), default=list(PLAN))
    options.add_argument("--repeats", type=int, help="turns that count, instead of 7 and 3")
    options.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "grip-speed.json")
    given = options.parse_args()
    # LLaVA-1.5-7B: 6.74e9 weights outside the embeddings' lookup, 576 visual and 64 text tokens
    scorer = Scorer(ScorerConfig(4096))
    share = scorer.flops(576, 32) / (2 * 6.48e9 * (576 + 64))
    result = {
        "schema": "gripvlm.grip_speed/2",
        "command": command_line(),
        "environment": environment(),
        "group": GROUP,
        "models": {name: measured(name, given.repeats) for name in given.models},
        "scorer_share_of_7b_prefill_flops": share,
        "scorer_parameters_at_4096": scorer.parameters_count,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"scorer's share of a 7B prefill: {100 * share:.2f} %")


if __name__ == "__main__":
    main()
