"""Tunes one method on validation questions, by the rule that all have: tuning.toml.

    python -m experiments.grip_claim.tune soft_topk                  # six runs, results/tuning/soft_topk.json
    python -m experiments.grip_claim.tune soft_topk --rates-only     # its three learning rates

Runs have 60 steps, warm-up 0 and a seed that the study does not use. Write what was best into configs/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.results import ROOT, STUDIES, read_json, write_json
from experiments.run import settings_of, summary, train
from gripvlm.eval.environment import git_state, hardware

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STUDY = "grip_claim"
SEED = 99
"""Warm-up 0, and 33 for everything else; the study has seeds 0 to 11."""


def plan() -> dict[str, Any]:
    return tomllib.loads((STUDIES / STUDY / "tuning.toml").read_text(encoding="utf-8"))


def tune(variant: str, work: Path, rates_only: bool) -> list[dict[str, Any]]:
    """The six runs, or the first three, in the order in which they were made."""
    settings, runs = settings_of(STUDY, variant), []
    prefix = "distill_" if settings["stage"] == "distill" else ""
    steps, rate = "distill_steps" if prefix else "max_steps", f"{prefix}learning_rate"

    def run(changes: dict[str, Any]) -> None:
        shorter = changes | {steps: plan()["steps"]}
        folder = train(STUDY, variant, SEED, work, shorter, name=f"tuning/{variant}-{len(runs)}")
        about = summary(folder, STUDY, variant)
        objective = about["val"][max(about["val"])]["objective"]
        spent = {name: about[name] for name in ("minutes", "rollouts", "tokens")}
        runs.append({"changes": changes, "objective": objective, **spent})

    for value in plan()["learning_rates"]:
        run({rate: value})
    best = max(runs, key=lambda each: each["objective"])["changes"]
    for change in [] if rates_only else plan()["changes"][variant]:
        run(best | change)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=[*plan()["changes"]])
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="questions and trained scorers")
    parser.add_argument("--rates-only", action="store_true", help="the learning rates and no other change")
    given = parser.parse_args()
    content = {
        "command": f"python -m experiments.grip_claim.tune {given.variant}" + " --rates-only" * given.rates_only,
        "git": git_state(),
        "hardware": hardware(),
        "runs": tune(given.variant, given.work, given.rates_only),
    }
    write_json(STUDIES / STUDY / "results" / "tuning" / f"{given.variant}.json", content)


def tuned() -> dict[str, list[dict[str, Any]]]:
    """Method -> its runs, of those that were tuned."""
    files = sorted((STUDIES / STUDY / "results" / "tuning").glob("*.json"))
    return {file.stem: read_json(file)["runs"] for file in files}


if __name__ == "__main__":
    main()
