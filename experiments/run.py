"""Trains and evaluates one variant of a study of Grip on the lab; writes results/<variant>/seed<N>.json.

    python -m experiments.run grip_ablation grpo --seed 0       # what it starts from is trained first
    python -m experiments.run grip_shipped grpo_2 --limit 0     # the whole test sample

Interrupt it at any time: the same command resumes. Questions to train on are made once, some minutes of CPU:

    PYTHONPATH=examples python -m lab_vlm.dataset WORK/train --split train --pictures 4000      # and WORK/val, val, 150
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.results import BUDGETS, ROOT, STUDIES, split

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def settings_of(study: str, variant: str) -> dict[str, Any]:
    """The study's defaults with what differs in this variant."""
    folder = STUDIES / study / "configs"
    settings = {}
    for name in ("default", variant):
        file = folder / f"{name}.toml"
        if not file.exists():
            known = sorted(path.stem for path in folder.glob("*.toml") if path.stem != "default")
            sys.exit(f"no variant {name!r} in {study}: use one of {', '.join(known)}")
        settings |= tomllib.loads(file.read_text(encoding="utf-8"))
    if "removed" in settings:
        sys.exit(f"{variant} needs {settings['removed']}, which gripvlm no longer has: see the commit in its results")
    if settings.get("budgets") == "choices":
        del settings["keep_high"]  # the log-uniform range, which a list of budgets does not read
    return settings


def flags(settings: dict[str, Any]) -> list[str]:
    """`num_iterations = 2` -> `--num-iterations 2`; `question = false` -> `--no-question`."""
    arguments = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        arguments += (
            # As the command's own help shortens it.
            [f"--{name}" if value else f"--no-{name.removeprefix('gradient-')}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return arguments


STAGES = {"relaxed": "experiments.grip_ablation.relaxations", "exploring": "experiments.grip_claim.exploring"}
"""Stages that are a study's own, and the command that trains them."""

OWN = {"warm_ups"}
"""Settings of a config that are read here."""


def train(
    study: str, variant: str, seed: int, work: Path, changes: Mapping[str, Any] | None = None, name: str = ""
) -> Path:
    """The folder of the trained scorer, after training it and what it starts from where they are not there yet.

    With `warm_ups = W` in its config, seeds cross warm-ups and seeds of the variant's own: run N starts from warm-up
    N mod W, and everything random in it comes from N div W.

    Args:
        changes: settings that differ from the config's; such a run has a `name`.
    """
    folder = work / study / f"{name or variant}-{seed}"
    if (folder / "model.safetensors").exists():
        return folder
    settings = settings_of(study, variant) | dict(changes or {})
    warm_ups = settings.pop("warm_ups", None)
    warm_up = seed
    if "init_from" in settings:
        seed, warm_up = divmod(seed, warm_ups) if warm_ups else (seed, seed)
        settings["init_from"] = train(study, settings["init_from"], warm_up, work)
    for key in ("data", "eval_data"):
        settings[key] = work / settings[key]
    stage = settings.pop("stage")
    module = [STAGES[stage]] if stage in STAGES else ["gripvlm", "train", stage]
    settings = {"seed": seed, "output_dir": folder} | settings
    subprocess.run([sys.executable, "-m", *module, *flags(settings)], cwd=ROOT, check=True)
    return folder


def summary(folder: Path, study: str, variant: str) -> dict[str, Any]:
    """What results keep of the training: settings, minutes, validation scores, environment."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "eval" in line]
    return {
        "settings": settings_of(study, variant),
        "steps": max(line["step"] for line in lines),
        "minutes": max(line["minutes"] for line in evaluations),
        "rollouts": max(line.get("num_rollouts", 0) for line in lines),
        "tokens": max(line.get("num_tokens", 0) for line in lines),
        "val": {line["step"]: line["eval"] for line in evaluations},
        "environment": json.loads((folder / "environment.json").read_text(encoding="utf-8")),
    }


def measure(study: str, variant: str, seed: int, folder: Path, limit: int) -> None:
    from gripvlm import Grip, lab
    from gripvlm.eval import evaluate
    from gripvlm.pruners import register_pruner

    name = settings_of(study, variant).get("model", "lab")
    model, processor = lab.load(name)
    register_pruner(variant, lambda: Grip(str(folder)))
    file = folder / "eval.json"
    keeps, settings = [*map(float, BUDGETS)], {"limit": limit or None, "batch_size": 16, "model_name": name}
    evaluate(model, processor, name, [variant], keeps, **settings, out=file)
    about = {"study": study, "seed": seed, "pruner": "grip", "training": summary(folder, study, variant)}
    about |= {"probability": probabilities(model, processor, Grip(str(folder)), name, limit)}
    split(file, STUDIES / study / "results", about, {variant: variant})


def probabilities(model: Any, processor: Any, pruner: Any, task: str, limit: int) -> dict[str, dict[str, str]]:
    """Family -> budget -> probability of the right answer, its tokens' geometric mean, to each test question in order.

    In thousandths, with spaces between: results of many runs must stay small.

    Args:
        pruner: one that reads features, place, question and key.
        limit: questions a family; 0: all.
    """
    from gripvlm.budget import Budget
    from gripvlm.grip.train import REWARDS, Engine
    from gripvlm.tasks import get_tasks

    engine, found = Engine(model, processor), {}
    for family in get_tasks([task]):
        by_budget: dict[str, list[str]] = {budget: [] for budget in BUDGETS}
        samples = family.take(limit or None, 0)  # those of `evaluate`
        for start in range(0, len(samples), 16):
            batch = engine.prepare([(family, sample) for sample in samples[start : start + 16]])
            images = [tokens for question in batch.tokens for tokens in question]
            for budget in BUDGETS:
                kept = [replace(tokens, keep=Budget(float(budget)).count(tokens.n)) for tokens in images]
                chosen = batch.by_question(each.indices for each in pruner.select_batch(kept))
                rollout = engine.run(batch, range(len(batch)), chosen, logits=False)
                by_budget[budget] += [f"{1000 * value:.0f}" for value in REWARDS["probability"](rollout).tolist()]
        found[family.name.rpartition("/")[2]] = {budget: " ".join(values) for budget, values in by_budget.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="questions and trained scorers")
    parser.add_argument("--limit", type=int, default=120, help="test questions a family; 0: all")
    given = parser.parse_args()
    folder = train(given.study, given.variant, given.seed, given.work)
    measure(given.study, given.variant, given.seed, folder, given.limit)


if __name__ == "__main__":
    main()
