"""results/overhead_NAME.json: what pruning adds to a call, phase by phase, for one version of gripvlm.

    PYTHONPATH=CHECKOUT/src python experiments/speed/overhead.py NAME       one turn, added to those in the file
    bash experiments/speed/overhead.sh OLD_CHECKOUT                         five turns of two versions in alternation

The lab's model at 12.5 % of the tokens. Milliseconds a sample: vision, pruner and overhead as the record has them,
`other` (checks), `prefill` (the pruned prompt to its first logits). A turn's number is the median of its calls.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

import gripvlm
from gripvlm import lab
from gripvlm.tasks import get_tasks

try:
    from gripvlm.eval import environment, make_inputs
except ImportError:  # a checkout from before the folder was renamed
    from gripvlm.evaluate import environment, make_inputs

CALLS, KEEP = 9, 0.125
PRUNERS = ("norm", "divprune", "cdpruner", "visionzip", "grip")


@torch.no_grad()
def turn(batch: int) -> dict[str, dict[str, float]]:
    """Pruner -> phase -> milliseconds a sample."""
    model, processor = lab.load()
    samples = get_tasks("lab/text")[0].samples[:batch]
    inputs = make_inputs(model, processor, [one.question for one in samples], [one.images for one in samples])
    calls: dict[str, list[dict[str, float]]] = {pruner: [] for pruner in PRUNERS}
    for _ in range(CALLS + 1):
        for pruner in PRUNERS:
            began = time.perf_counter()
            with gripvlm.pruned_run(model, inputs, pruner, KEEP) as (arguments, record):
                ready = time.perf_counter()
                model(**arguments, logits_to_keep=1)
                ended = time.perf_counter()
            seconds = dict(record.seconds)
            if "surgery" in seconds:  # its name in checkouts from before
                seconds["overhead"] = seconds.pop("surgery")
            calls[pruner].append(seconds | {"other": ready - began - sum(seconds.values()), "prefill": ended - ready})
    return {
        pruner: {phase: 1000 / batch * statistics.median(call[phase] for call in made[1:]) for phase in made[0]}
        for pruner, made in calls.items()  # the first call warms up
    }


if __name__ == "__main__":
    file = Path(__file__).parent / "results" / f"overhead_{sys.argv[1]}.json"
    turns = json.loads(file.read_text())["turns"] if file.exists() else []
    turns.append({str(batch): turn(batch) for batch in (1, 16)})
    about = {"schema": "gripvlm.overhead/1", "command": " ".join(sys.argv), **environment()}
    file.write_text(json.dumps(about | {"calls": CALLS, "keep": KEEP, "turns": turns}, indent=1) + "\n")
    print(f"{sys.argv[1]} ({gripvlm.__file__}): {len(turns)} turns")
