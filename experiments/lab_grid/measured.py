"""src/gripvlm/cli/measured.json: what `gripvlm list` and `quickstart` show of pruners, without importing torch.

python -m experiments.lab_grid.measured
"""

from __future__ import annotations

import json
from typing import Any

from experiments.lab_grid import analyze
from experiments.results import ROOT, percent, read_json
from gripvlm.pruners import get_pruner
from gripvlm.pruners.registry import _BUILT_IN, PrunerRow, list_pruners
from gripvlm.tasks import task_names

TARGET = ROOT / "src" / "gripvlm" / "cli" / "measured.json"
COST_AT = 0.125
COSTS = ("experiments/speed/results/cpu_lab.json", "experiments/speed/results/cpu_llava-0.5b.json")
FILES = ("experiments/lab_grid/REPORT.md", "experiments/speed/results/pruners.json")


def costs() -> list[dict[str, Any]]:
    """What Grip adds to the unpruned prefill, and what a question then takes, on the lab's model and a 0.5 B one."""
    found = []
    for name in COSTS:
        content = read_json(ROOT / name)
        full = content["rows"][0]
        wanted = ("grip", COST_AT, 1)
        row = next(row for row in content["rows"] if (row["pruner"], row["keep"], row["batch"]) == wanted)
        hardware = content["environment"]["hardware"]
        found.append(
            {
                "file": name,
                "model": content["model"]["name"],
                "parameters": content["model"]["parameters"],
                "tokens": row["visual_tokens"],
                "kept": row["kept"],
                "added": round(row["to_full"]["added"]["median"], 5),
                "whole": round(row["to_full"]["whole"]["median"], 4),
                "seconds": [round(one["seconds"]["first_token"]["median"], 4) for one in (full, row)],
                "kv_megabytes": [round(one["kv_bytes"] / 1e6, 3) for one in (full, row)],
                "hardware": f"{hardware['processor']}, {hardware['threads']} threads",
            }
        )
    return found


def advice() -> list[str]:
    """Sentences for the end of `gripvlm list`."""
    lines = [
        f"On the lab's model ({analyze.questions()} questions, all tokens: {percent(analyze.full_score())}), cheapest "
        "untrained pruner whose interval reaches that score:"
    ]
    for budget in analyze.BUDGETS:
        scores = analyze.scores("input", budget)
        grip = next(percent(row.score) for row in scores if row.pruner == "grip")
        best = next(row for row in scores if not row.trained)
        enough = analyze.cheapest_enough(budget)
        if enough is None:
            text = f"nothing untrained is enough (best: {best.pruner}, {percent(best.score)}); grip has {grip}"
        else:
            text = f"{enough.pruner} ({percent(enough.score)}) is enough, and grip has {grip}"
        lines.append(f"{100 * float(budget):g}%: {text}")
    return [
        *lines,
        "grip must be trained for your model (gripvlm train). Pruners that read the vision tower's attention or drop "
        "inside the LLM do not serve every model. Which serves which, and at what cost: docs/choosing.md",
    ]


def described(row: PrunerRow) -> dict[str, Any]:
    """What the registry says of a pruner."""
    wrapped = [option for option in row.options if option.kind is Any and option.required]  # typed in parentheses
    needs = {*(get_pruner(row.name).needs if row.name == "grip" else row.needs)}
    options = [option for option in row.options if option not in wrapped]
    return {
        "stage": row.stage,
        "source": row.source,
        "trained": row.trained,
        "wraps": "wrapper" in row.source,
        "attention": bool(needs & {"vision_attention", "vision_given", "patches"}),
        "question": "question" in needs or row.stage == "llm",  # there the prompt has been read
        "grid": "grid" in needs,
        "options": [str(option) for option in options],
    }


def measured() -> dict[str, Any]:
    speed = read_json("speed/results/pruners.json")
    shares, rows = analyze.prefill_shares(), {}
    for row in list_pruners():
        if row.name not in _BUILT_IN:
            continue
        shown = described(row)
        if score := analyze.lab_score(row.name, row.stage):
            shown |= {"score": round(score.score, 4), "ci_low": round(score.low, 4), "ci_high": round(score.high, 4)}
            shown |= {"keep": float(score.budget), "measured_as": score.pruner}
        if row.name in shares:
            shown["prefill_share"] = shares[row.name]
        rows[row.name] = shown
    device = speed["environment"]["hardware"]["device"]
    share_of_7b = read_json("speed/results/rollouts.json")["scorer_share_of_7b_prefill_flops"]
    return {
        "written_by": "python -m experiments.lab_grid.measured",
        "files": FILES,
        "questions": analyze.questions(),
        "advice": advice(),
        "costs": costs(),
        "share_of_7b": float(f"{share_of_7b:.3g}"),
        "tasks": task_names(),
        "prefill": {"tokens": speed["cells"][0]["n"], "parameters": speed["model"]["parameters"], "device": device},
        "pruners": rows,
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    print(TARGET)
