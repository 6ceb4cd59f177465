"""results/static-shapes.json: does a compiled prefill pay, and is it used again when prompts differ in length?

    OMP_NUM_THREADS=1 python runs/static_shapes.py       five minutes; needs a C++ compiler

The lab's model, 8 prompts, Grip keeping 32 of 256 tokens. Requests of several text lengths, one after the other, by the
model as it is, by one compiled for each shape (`dynamic=False`), and by the same with `pad_to_multiple_of=64`. `first`:
seconds of a length's first request, compiling included; `later`: seconds of each of its later requests.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

import gripvlm
from gripvlm import lab
from gripvlm.bench.roofline import spread
from gripvlm.eval import environment, make_inputs
from gripvlm.eval.environment import command_line
from gripvlm.models.loading import quiet
from gripvlm.tasks import get_tasks

BATCH, KEEP, LATER, MULTIPLE = 8, 32, 15, 64
WAYS = {"as it is": (False, None), "compiled": (True, None), "compiled, padded": (True, MULTIPLE)}


@torch.no_grad()
def main() -> None:
    quiet()
    model, processor = lab.load()
    samples = get_tasks("lab/text")[0].samples[:BATCH]
    requests = []
    for words in (0, 2, 4):
        texts = [one.question + " please" * words for one in samples]
        requests.append(make_inputs(model, processor, texts, [one.image for one in samples]))
    forward, found = model.forward, {}
    answers: dict[str, list[torch.Tensor]] = {}
    for way, (compiled, multiple) in WAYS.items():
        torch._dynamo.reset()
        model.forward = torch.compile(forward, dynamic=False) if compiled else forward
        rows: list[dict[str, Any]] = []
        for inputs in requests:
            times = []
            for _ in range(LATER + 1):
                run = gripvlm.pruned_run(model, inputs, "grip", KEEP, pad_to_multiple_of=multiple)
                with run as (arguments, _):
                    began = time.perf_counter()
                    logits = model(**arguments, use_cache=False, logits_to_keep=1).logits
                    times.append(time.perf_counter() - began)
            answers.setdefault(way, []).append(logits)
            length = arguments["input_ids"].shape[1]
            rows.append({"length": length, "first": times[0], "later": spread(times[1:])})
        found[way] = rows
        print(way, rows)
    for way in WAYS:
        for one, other in zip(answers[way], answers["as it is"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    result = {"schema": "gripvlm.static_shapes/1", "command": command_line(), **environment()}
    result |= {"batch": BATCH, "keep": KEEP, "multiple": MULTIPLE, "ways": found}
    (Path(__file__).parent.parent / "results" / "static-shapes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
