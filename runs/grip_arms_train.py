"""results/grip-arms-train.json: how the arms of runs/grip_arms.sh trained, from their folders.

python runs/grip_arms_train.py FOLDER [NAME]     with runs named ARM-SEED in it, such as .lab/grip/arms

NAME is another file's in results/.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from gripvlm.eval import environment
from gripvlm.eval.environment import command_line
from gripvlm.grip.train.config import TrainConfig, read_toml

ROOT = Path(__file__).parent.parent


def run(folder: Path) -> dict[str, Any]:
    config = TrainConfig(**read_toml(folder / "config.toml"))
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == config.stage]
    judged = {line["step"]: line for line in lines if "val" in line}
    steps = {line["step"]: line for line in lines if "val" not in line}
    best = max(judged, key=lambda step: judged[step]["val"]["objective"])
    several = config.num_generations + (config.baseline == "self_critical")
    tried = several * config.images * config.questions * config.accumulate if config.stage == "grpo" else 0
    defaults = TrainConfig(data="x").to_dict()
    free = {"data", "val_data", "out", "start", "stage", "seed"}
    stats = [name for name in next(iter(steps.values())) if name not in ("stage", "step", "lr", "loss")]
    half = [line for step, line in steps.items() if step > max(steps) // 2]
    return {
        "stage": config.stage,
        "settings": {k: v for k, v in config.to_dict().items() if k not in free and v != defaults[k]},
        "steps": max(steps),
        "rollouts": tried * max(steps),
        "minutes": max(line["minutes"] for line in judged.values()),
        "best": best,
        "val": {step: line["val"] for step, line in judged.items()},
        "second_half": {name: sum(line[name] for line in half) / len(half) for name in stats},
        "environment": json.loads((folder / "environment.json").read_text()),
    }


def main() -> None:
    arms: dict[str, dict[str, Any]] = defaultdict(dict)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        if (folder / "scorer.json").exists():
            name, _, seed = folder.name.rpartition("-")
            arms[name][seed] = run(folder)
    result = {"command": command_line(), **environment(), "arms": arms}
    name = sys.argv[2] if len(sys.argv) > 2 else "grip-arms-train.json"
    (ROOT / "results" / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
