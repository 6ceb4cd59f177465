"""Tables of REPORT.md, of what has been measured.

python -m experiments.serving.analyze
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.results import STUDIES, average, load, percent, read_json, table
from experiments.tables import fill

PAGE = "experiments/serving/REPORT.md"


def curves(content: dict[str, Any]) -> str:
    sizes = sorted({row["batch"] for row in content["rows"]})
    full = {row["batch"]: row for row in content["rows"] if row["keep"] == 1.0}
    lines = []
    for keep in sorted({row["keep"] for row in content["rows"]}, reverse=True):
        found = {row["batch"]: row for row in content["rows"] if row["keep"] == keep}
        cells = [f"{found[size]['prefill'] / full[size]['prefill']:.2f}" for size in sizes]
        lines.append([f"{100 * keep:g} %", *cells, f"{found[sizes[-1]]['step'] / full[sizes[-1]]['step']:.2f}"])
    milliseconds = [f"{1000 * full[size]['prefill']:.0f}" for size in sizes]
    lines.append(["100 %, in ms", *milliseconds, f"{1000 * full[sizes[-1]]['step']:.1f}"])
    return table(["kept", *(f"prefill of {size}" for size in sizes), f"step of {sizes[-1]}"], lines)


def lab_score(row: dict[str, Any]) -> float:
    """What the lab's scores at these budgets (grip_shipped) make of the mixture of budgets that was served."""
    scorer = load("grip_shipped/results")["lab"]
    shares = {name.removeprefix("at "): each for name, each in row.items() if name.startswith("at ")}
    value = {keep: each["mean"] if isinstance(each, dict) else each for keep, each in shares.items()}
    return sum(share * average(scorer, keep) for keep, share in value.items())


def simulated(content: dict[str, Any]) -> str:
    def cell(each: dict[str, float], scale: float = 100) -> str:
        return f"{scale * each['mean']:.1f} ± {scale * each['half']:.1f}"

    lines = []
    for row in content["rows"]:
        place = f"{row['shape']}, {row['replicas']:,}: {row['arm']}"
        numbers = [cell(row["in_time"]), cell(row["refused"]), cell(row["p50"], 1), cell(row["p95"], 1)]
        lines.append([place, *numbers, percent(row["mean_keep"]["mean"]), percent(lab_score(row))])
    head = ["arrivals, replicas: budget", "in time, %", "refused, %", "p50 / target", "p95 / target", "kept, %"]
    return table([*head, "lab score"], lines)


def machines(content: dict[str, Any]) -> str:
    arms = list(dict.fromkeys(row["arm"] for row in content["machines"]))
    by_shape: dict[str, dict[str, Any]] = {}
    for row in content["machines"]:
        by_shape.setdefault(row["shape"], {})[row["arm"]] = row
    lines = [
        [shape, *(str(rows[arm]["replicas"]) for arm in arms), *(percent(lab_score(rows[arm])) for arm in arms)]
        for shape, rows in by_shape.items()
    ]
    return table(["arrivals", *(f"replicas, {arm}" for arm in arms), *(f"lab score, {arm}" for arm in arms)], lines)


def clients(content: dict[str, Any]) -> str:
    lines = []
    for row in content["rows"]:
        full = next(each for each in content["rows"] if each["clients"] == row["clients"] and each["keep"] == "100%")
        ratios = [f"{row[name] / full[name]:.2f}" for name in ("per_second", "p50", "p95")]
        numbers = [f"{row['per_second']:.1f}", f"{1000 * row['p50']:.0f}", f"{1000 * row['p95']:.0f}"]
        lines.append([f"{row['clients']}, {row['keep']}", *ratios, *numbers, percent(row["score"])])
    head = ["clients, kept", "requests/s, ratio", "p50, ratio", "p95, ratio", "requests/s", "p50, ms", "p95, ms"]
    return table([*head, "lab score"], lines)


def tripled(content: dict[str, Any]) -> str:
    lines = []
    for arm, row in content["tripled"].items():
        shares = [percent(row[name]) for name in ("seconds_on_target", "in_time")]
        times = [f"{row[name] / content['target']:.2f}" for name in ("p50", "p95")]
        lines.append([arm, *shares, *times, str(row["refused"]), percent(row["keep"]), percent(row["score"])])
    head = ["budget", "seconds on target, %", "in time, %", "p50 / target", "p95 / target", "refused", "kept, %"]
    return table([*head, "lab score"], lines)


def confidence(content: dict[str, Any]) -> str:
    lines = [
        [
            f"{row['model']}: `{row['pruner']}`, keep={row['keep']}",
            f"{row['tokens']:.1f}",
            f"{percent(row['score'])} [{percent(row['ci_low'])}, {percent(row['ci_high'])}]",
        ]
        for row in sorted(content["rows"], key=lambda row: (row["model"], row["tokens"]))
    ]
    return table(["", "tokens paid, mean", "lab score"], lines)


MADE_FROM: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "curves.json": {"curves": curves},
    "simulation.json": {"simulated": simulated, "machines": machines},
    "load.json": {"clients": clients, "tripled": tripled},
    "top_p.json": {"confidence": confidence},
}
"""Results -> the tables made from them. One that has not been measured leaves its place in the report as it is."""


def tables() -> dict[str, dict[str, str]]:
    found = {}
    for file, made in MADE_FROM.items():
        if (STUDIES / "serving/results" / file).exists():
            content = read_json(f"serving/results/{file}")
            found |= {name: make(content) for name, make in made.items()}
    return {PAGE: found}


if __name__ == "__main__":
    for page, each in tables().items():
        fill(page, each)
