"""results/overhead_NAME.json: what pruning adds to a call, phase by phase, for one version of gripvlm.

    PYTHONPATH=CHECKOUT/src python experiments/speed/overhead.py NAME       one turn, added to those in the file
    bash experiments/speed/overhead.sh OLD_CHECKOUT                         five turns of two versions in alternation

The lab's model, batch 1 and 16, 12.5 % of the tokens, pruners by name. Milliseconds a sample: vision, pruner and
overhead as the record has them, `other` (checks), `prefill` (the pruned prompt to its first logits), `full` (the
unpruned prompt's prefill). A turn's number is the median of its calls; the file keeps every turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

import gripvlm
from gripvlm import lab
from gripvlm.eval import environment, make_inputs
from gripvlm.eval.environment import command_line
from gripvlm.models.loading import quiet
from gripvlm.tasks import get_tasks

BATCHES, CALLS, KEEP = (1, 16), 9, 0.125
PRUNERS = ("norm", "divprune", "cdpruner", "visionzip", "grip")


@torch.no_grad()
def turn() -> dict[str, dict[str, dict[str, float]]]:
    """batch -> pruner -> phase -> milliseconds a sample."""
    model, processor = lab.load()
    samples = get_tasks("lab/text")[0].samples[: max(BATCHES)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for batch in BATCHES:
        some = samples[:batch]
        inputs = make_inputs(model, processor, [one.question for one in some], [one.image for one in some])
        whole = gripvlm.prune_inputs(model, inputs, "keep_all")
        calls: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for call in range(CALLS + 1):
            for pruner in PRUNERS:
                began = time.perf_counter()
                with gripvlm.pruned_run(model, inputs, pruner, KEEP) as (arguments, record):
                    ready = time.perf_counter()
                    model(**arguments, logits_to_keep=1)
                    ended = time.perf_counter()
                seconds = dict(record.seconds)
                seconds |= {"other": ready - began - sum(seconds.values()), "prefill": ended - ready}
                began = time.perf_counter()
                model(**whole, logits_to_keep=1)
                seconds["full"] = time.perf_counter() - began
                if call:  # the first warms up
                    for phase, value in seconds.items():
                        calls[pruner][phase].append(1000 * value / batch)
        found[str(batch)] = {
            pruner: {phase: statistics.median(values) for phase, values in mine.items()}
            for pruner, mine in calls.items()
        }
    return found


def main() -> None:
    quiet()
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    file = Path(__file__).parent / "results" / f"overhead_{sys.argv[1]}.json"
    turns = json.loads(file.read_text())["turns"] if file.exists() else []
    tree = Path(gripvlm.__file__).parents[2]
    about = environment()
    result = {
        "schema": "gripvlm.overhead/1",
        "command": command_line(),
        **about,
        "calls": CALLS,
        "keep": KEEP,
        "turns": [*turns, turn()],
    }
    print(f"{sys.argv[1]} ({tree}): {len(result['turns'])} turns")
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
