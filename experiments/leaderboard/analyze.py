"""The table of REPORT.md.

python -m experiments.leaderboard.analyze
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from experiments.leaderboard.add import FOLDER
from experiments.results import percent, table
from experiments.tables import fill
from gripvlm.budget import Budget
from gripvlm.eval import Results, read_results

PAGE = "experiments/leaderboard/REPORT.md"
HEAD = ("model", "task", "method", "keep", "right, %", "all tokens", "`random`", "tokens", "device", "file")


def of_file(results: Results) -> list[list[str]]:
    """A row for each task, method and budget, beside all tokens and chance at the same budget."""
    scores: dict[tuple[str, str, str], list[float]] = {}  # of all seeds
    for row in results.rows:
        setting = (row["task"], row["pruner"].partition(":seed=")[0], str(row["keep"]))
        scores.setdefault(setting, []).append(row["score"])
    head, found = results.header, []
    for row in results.rows:
        task, keep = row["task"], str(row["keep"])
        if row["pruner"].partition(":seed=")[0] in ("full", "random"):
            continue
        right = percent(row["score"])
        if row["ci_low"] is not None:
            right += f" [{percent(row['ci_low'])}, {percent(row['ci_high'])}]"
        luck = scores.get((task, "random", keep))
        others = [percent(mean(scores[task, "full", "1.0"])), percent(mean(luck)) if luck else "-"]
        found.append(
            [
                *(head["model"], task, f"`{row['pruner']}`", Budget.of(row["keep"]).short, right, *others),
                *(f"{row['tokens']:.0f}", head["hardware"].get("device") or head["device"]),
                f"[json](results/{results.path.name})",
            ]
        )
    return found


def tables(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    rows = [row for file in sorted(folder.glob("*.json")) for row in of_file(read_results(file))]
    return {PAGE: {"leaderboard": table(HEAD, rows or [["none yet", *["-"] * (len(HEAD) - 1)]])}}


if __name__ == "__main__":
    for path, page in tables().items():
        fill(path, page)
