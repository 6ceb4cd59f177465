"""Tables of REPORT.md.

python -m experiments.gpu.analyze
"""

from __future__ import annotations

from experiments.results import read_json, table
from experiments.speed.analyze import spread
from experiments.tables import fill

STUDY = "gpu"
MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")
SHOWN = (0.5, 0.11, 0.05)


def end_to_end(model: str) -> str:
    """Times as shares of the unpruned model's in the same turn, memory beside them."""
    rows = []
    for row in read_json(f"{STUDY}/results/h200_bench-{model}.json")["rows"]:
        if row["kind"] == "limit" or (row["kind"] == "pruned" and row["keep"] not in SHOWN):
            continue
        full = row["kind"] == "full"
        times, scale, digits = (row["seconds"], 1000.0, 0) if full else (row["to_full"], 1.0, 2)
        what = "unpruned, ms" if full else f"{row['pruner']}, {row['kept']:.0f} of {row['visual_tokens']:.0f}"
        phases = [spread(times[phase], scale, digits) for phase in ("first_token", "whole")]
        added = "-" if full else spread(row["to_full"]["added"], 100, 1)
        memory = (f"{row['peak_memory'] / 2**30:.1f}", f"{row['kv_bytes'] / 1e6:.0f}")
        rows.append([f"batch {row['batch']}: {what}", *phases, added, *memory])
    return table(["", "first token", "end to end", "added, %", "peak, GiB", "cache, MB"], rows)


def training() -> str:
    """One step of each stage."""
    rows = []
    for step in read_json(f"{STUDY}/results/h200_train.json")["steps"]:
        name = f"{step['stage']} {step.get('teacher') or step.get('relaxation') or ''}".strip()
        seconds = f"{60 * step['step_minutes'][0]:.1f}" if step["step_minutes"] else "-"
        rows.append([name, f"{step['peak_gib']:.1f}", seconds, step["failed"] or "done"])
    return table(["", "peak, GiB", "step, s", "outcome"], rows)


def tables() -> dict[str, dict[str, str]]:
    page = {model: end_to_end(model) for model in MODELS} | {"training": training()}
    return {f"experiments/{STUDY}/REPORT.md": page}


if __name__ == "__main__":
    for path, page in tables().items():
        fill(path, page)
