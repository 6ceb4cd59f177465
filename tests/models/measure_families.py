"""Measures the invariants of docs/families.md on every family: experiments/families/results/transformers-VERSION.json.

    python tests/models/measure_families.py     # a minute on one thread; any transformers version
    python -m experiments.families.analyze      # then the tables

Tiny random models of tests/tiny_families: float32 on the CPU, logits that spread over about +-10, a batch of three
prompts (one image, two images, none; left-padded), 5 rows of each visual item kept by "random", 8 greedy tokens.
`inside` is "fastv" with keep=0.75 on average over 4 layers, against the full model whose later layers mask what was
dropped.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "tests/models", "tests/engine")]

from test_llm_drop import masking  # noqa: E402
from test_llm_stage import KEEP, stages_of  # noqa: E402

import gripvlm  # noqa: E402
from gripvlm.eval.environment import command_line, environment  # noqa: E402
from gripvlm.models import FAMILIES  # noqa: E402
from tiny_families import TINY, build, make  # noqa: E402
from tiny_families.reference import full_positions, kept, masked, teacher_forced  # noqa: E402

IMAGES, WORDS = [1, 2, 0], [7, 9, 5]
TOKENS = 8
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
MIX = ["v", "i", "viv"]


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference of two lists of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def entries(cache: Any) -> int:
    """Tokens in the cache's longest layer."""
    return max(layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None)


def measure(name: str, attention: str) -> dict[str, Any]:
    """The invariants of one family under one attention implementation, by number as in the page."""
    tiny, model = TINY[name], build(name, attention)
    inputs = make(tiny, IMAGES, WORDS).inputs
    before = dict(vars(model))
    plain = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=1.0):
        everything = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=5) as record:
        pruned = model.generate(**inputs, **GREEDY)
        alone = [model.generate(**make(tiny, IMAGES, WORDS, only=b).inputs, **GREEDY) for b in range(3)]
    selections = gripvlm.prune_inputs(model, inputs, "random", keep=5, return_record=True)[1].selections
    arguments = gripvlm.prune_inputs(model, inputs, "random", keep=5)
    found: dict[str, Any] = {
        "keep_all": apart(everything.logits, plain.logits),
        "keep_all_same_text": torch.equal(everything.sequences, plain.sequences),
        "effect": apart(pruned.logits[:1], plain.logits[:1]),
        "equals": FAMILIES[name].equals,
    }
    if FAMILIES[name].equals == "masking":
        reference = model.generate(**masked(model, inputs, selections), **GREEDY)
        found["dropping"] = apart(pruned.logits, reference.logits)
        found["dropping_same_text"] = torch.equal(pruned.sequences, reference.sequences)
    else:
        new = pruned.sequences[:, -TOKENS:]
        found["dropping"] = apart(pruned.logits, teacher_forced(model, arguments, new))
        found["dropping_same_text"] = True  # one forward over the generated text: nothing is generated anew
    keep = kept(inputs["input_ids"], inputs["attention_mask"], selections)
    real = arguments["attention_mask"].bool()
    positions = full_positions(model, inputs)
    found["exact"] = torch.equal(arguments["input_ids"][real], inputs["input_ids"][keep]) and {
        s.k for sample in selections for s in sample
    } == {5}
    axes = slice(1, None) if positions.ndim == 3 else slice(None)
    ours = arguments["position_ids"][axes] if positions.ndim == 3 else arguments["position_ids"]
    theirs = positions[axes] if positions.ndim == 3 else positions
    found["positions"] = torch.equal(ours[..., real], theirs[..., keep])
    found["batch"] = max(
        apart([x[0] for x in one.logits], [x[b] for x in pruned.logits]) for b, one in enumerate(alone)
    )
    found["batch_same_text"] = all(
        torch.equal(one.sequences[0, -TOKENS:], pruned.sequences[b, -TOKENS:]) for b, one in enumerate(alone)
    )
    found["cache"] = [entries(plain.past_key_values), entries(pruned.past_key_values)]
    found["model_as_before"] = dict(vars(model)) == before
    found["selection"] = [[s.indices.tolist() for s in sample] for sample in record.selections]
    if FAMILIES[name].layers and FAMILIES[name].equals == "masking":
        with gripvlm.prune(model, "fastv", keep=KEEP) as record:
            ours = model.generate(**inputs, **GREEDY)
        full = build(name, "eager")
        with masking(full, stages_of(inputs["input_ids"], inputs["attention_mask"], record.selections)):
            theirs = full.generate(**inputs, **GREEDY)
        found["inside"] = apart(ours.logits, theirs.logits)
        found["inside_same_text"] = torch.equal(ours.sequences, theirs.sequences)
        found["layers"] = [s.counts for sample in record.selections for s in sample]
    if tiny.video:
        videos = make(tiny, MIX, [7, 9, 6]).inputs
        with gripvlm.prune(model, "random", keep=5) as record:
            ours = model.generate(**videos, **GREEDY)
        found["video"] = apart(ours.logits, model.generate(**masked(model, videos, record.selections), **GREEDY).logits)
    return found


def main() -> None:
    started, families = time.perf_counter(), {}
    for name in sorted(TINY):
        families[name] = {attention: measure(name, attention) for attention in ("sdpa", "eager")}
        print(name, flush=True)
    result = {
        "command": command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "dtype": "float32",
        "setting": {"images": IMAGES, "words": WORDS, "keep": 5, "pruner": "random", "tokens": TOKENS, "videos": MIX},
        "families": families,
        "seconds": round(time.perf_counter() - started, 1),
    }
    file = ROOT / "experiments" / "families" / "results" / f"transformers-{transformers.__version__}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
