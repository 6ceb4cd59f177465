"""Does the scorer know where its budget will not do? `top_p(grip)` against `grip` at fixed counts, on both labs.

    OMP_NUM_THREADS=1 python -m experiments.serving.confidence     writes results/top_p.json; under ten minutes

If the scorer knows, `top_p` has a higher score than `grip` at the same mean count, as it adds tokens where they help.
"""

from __future__ import annotations

import argparse
import sys

from experiments.results import STUDIES, write_json
from gripvlm import lab
from gripvlm.eval import environment, evaluate
from gripvlm.tasks import get_tasks

OUT = STUDIES / "serving/results/top_p.json"
FIXED = (4, 5, 6, 8, 12, 16)
"""Tokens of an image; `top_p` starts from the first."""
SCORERS = {
    "lab": ("grip", (0.6, 0.9, 0.99, 0.999)),
    "lab-dense": ("grip:scorer=lab-dense", (0.05, 0.1, 0.2, 0.4)),
}
"""Model -> its scorer and p of `top_p`. First runs: on `lab` 0.2 and 0.4 added next to nothing, on `lab-dense` 0.6 and
above added all that `most` allows to nearly every image."""
KEPT = ("pruner", "keep", "tokens", "score", "ci_low", "ci_high")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=600, help="questions of each lab; default 600")
    limit = parser.parse_args().limit
    rows = []
    for name, (scorer, shares) in SCORERS.items():
        model, processor = lab.load(name)
        tasks = get_tasks([name])
        for pruners, keeps in (([scorer], FIXED), ([f"top_p({scorer}):p={p},most=4" for p in shares], FIXED[:1])):
            found = evaluate(
                model, processor, tasks, pruners, keeps, limit=limit // len(tasks), blind=False, model_name=name
            )
            means = [row for row in found["means"] if row["pruner"] != "full"]
            rows += [{"model": name} | {key: row[key] for key in KEPT} for row in means]
    command = f"python -m experiments.serving.confidence --limit {limit}"
    write_json(OUT, {"study": "serving", "command": command, **environment(), "seed": 0, "limit": limit, "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    sys.exit(main())
