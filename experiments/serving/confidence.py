"""Does the scorer know where its budget will not do? `top_p(grip)` against `grip` at fixed counts, on the lab.

    OMP_NUM_THREADS=1 python -m experiments.serving.confidence     writes results/top_p.json; under five minutes

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
FIXED, FROM, SHARES = (4, 6, 8, 12, 16), 4, (0.2, 0.4, 0.6)
KEPT = ("pruner", "keep", "tokens", "score", "ci_low", "ci_high")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="questions a family; default 100")
    limit = parser.parse_args().limit
    model, processor = lab.load()
    tasks = get_tasks(["lab"])
    rows = []
    for pruners, keeps in ((["grip"], FIXED), ([f"top_p(grip):p={p},most=4" for p in SHARES], (FROM,))):
        found = evaluate(model, processor, tasks, pruners, keeps, limit=limit, blind=False, model_name="lab")
        rows += [{name: row[name] for name in KEPT} for row in found["means"] if row["pruner"] != "full"]
    command = f"python -m experiments.serving.confidence --limit {limit}"
    write_json(OUT, {"study": "serving", "command": command, **environment(), "seed": 0, "limit": limit, "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    sys.exit(main())
