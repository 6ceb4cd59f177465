"""Service curves of one replica: what a batch takes, by its size and by the share of visual tokens that is kept.

    OMP_NUM_THREADS=1 python -m experiments.serving.measure     writes results/curves.json; under two minutes

The lab model and grip on one CPU core, float32. Times are processor times of this process, the least of some repeats,
so that they hardly depend on what else runs: `tower` of encoding one picture, `prefill` of a batch's first token
(pruning included, pictures encoded already), `step` of each token after it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import gripvlm
from experiments.results import STUDIES, write_json
from gripvlm import lab
from gripvlm.eval import environment, make_inputs, question_ids
from gripvlm.tasks import get_tasks

OUT = STUDIES / "serving/results/curves.json"
BATCHES, KEEPS, REPEATS, STEPS = (1, 2, 4, 8), (1.0, 0.5, 0.25, 0.125, 0.1), 5, 4


def least(run: Callable[[], Any]) -> float:
    """The least processor time of some runs, after one that does not count."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model, processor = lab.load()
    samples = get_tasks(["lab"])[0].samples[: max(BATCHES)]
    grip = gripvlm.Grip.from_pretrained("lab")
    rows = []
    for size in BATCHES:
        some = samples[:size]
        texts = [sample.question for sample in some]
        inputs = make_inputs(model, processor, texts, [sample.images for sample in some])
        question = question_ids(processor, texts)
        encoded = gripvlm.encode(model, inputs, [grip])
        if size == 1:
            tower = least(lambda inputs=inputs: gripvlm.encode(model, inputs, [grip]))
        options = {"question": question, "encoded": encoded}
        for keep in KEEPS:

            def answer(tokens: int, inputs: Any = inputs, options: Any = options, keep: float = keep) -> None:
                with gripvlm.pruned_run(model, inputs, grip, keep, **options) as (arguments, _):
                    model.generate(**arguments, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

            prefill = least(lambda: answer(1))
            step = max(0.0, least(lambda: answer(1 + STEPS)) - prefill) / STEPS
            rows.append({"batch": size, "keep": keep, "prefill": prefill, "step": step})
            print(json.dumps(rows[-1]))
    content = {"study": "serving", "command": "python -m experiments.serving.measure", **environment()}
    write_json(OUT, {**content, "model": "lab", "pruner": "grip", "tower": tower, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
