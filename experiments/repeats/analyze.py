"""Tables of REPORT.md.

python -m experiments.repeats.analyze
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from experiments.results import read_json, table
from experiments.tables import fill

PAGE = "experiments/repeats/REPORT.md"
SIZE = 2.0
"""Megapixels, where a table is for one size."""


def share(rows: list[dict[str, Any]], levels: str = "0") -> str:
    """Percent of the cells that are left, the mean over pictures."""
    return f"{100 * mean(row['left'][levels] / row['cells'] for row in rows):.0f}"


def chosen(
    rows: list[dict[str, Any]], kind: str, megapixels: float, file: str = "PNG", family: str = "Qwen2.5-VL"
) -> list[dict[str, Any]]:
    """The pictures of one kind and size."""
    wanted = {"kind": kind, "megapixels": megapixels, "file": file, "family": family}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def tokens(rows: list[dict[str, Any]]) -> str:
    sizes = sorted({row["megapixels"] for row in rows})
    head = ["tokens left, %", *(f"{size:g} MP" for size in sizes), f"Qwen3-VL, {SIZE:g} MP", f"unique, {SIZE:g} MP"]
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        at = chosen(rows, kind, SIZE)
        unique = f"{100 * mean(row['unique'] / row['cells'] for row in at):.0f}"
        larger = [share(chosen(rows, kind, size)) for size in sizes]
        lines.append([kind, *larger, share(chosen(rows, kind, SIZE, family="Qwen3-VL")), unique])
    return table(head, lines)


def thresholds(rows: list[dict[str, Any]]) -> str:
    levels = list(chosen(rows, rows[0]["kind"], SIZE)[0]["left"])
    names = ["equal" if level == "0" else f"within {level}" for level in levels]
    head = [f"tokens left, %, {SIZE:g} MP", *(f"{file}: {name}" for file in ("PNG", "JPEG 90") for name in names)]
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = [share(chosen(rows, kind, SIZE, file), level) for file in ("PNG", "JPEG 90") for level in levels]
        lines.append([kind, *cells])
    return table(head, lines)


def finding(rows: list[dict[str, Any]]) -> str:
    at = [row for row in rows if row["megapixels"] == SIZE and row["family"] == "Qwen2.5-VL"]
    levels = list(at[0]["left"])
    times = [f"{1000 * mean(row['seconds'][level] for row in at):.0f}" for level in levels]
    head = [f"{SIZE:g} MP", *("equal" if level == "0" else f"within {level} steps" for level in levels)]
    return table(head, [["milliseconds", *times]])


def speed(rows: list[dict[str, Any]]) -> str:
    head = [
        "",
        "visual tokens",
        "FLOPs to the prefill",
        "FLOPs, whole",
        "time to the prefill",
        "language model",
        "whole",
    ]
    lines = []
    for row in rows:
        parts = [row["to the prefill"], row["language model"], row["whole"]]
        flops = [f"{part['flops_of_all']:.2f}" for part in (parts[0], parts[2])]
        name = f"{row['kind']}: {row['setting']}"
        lines.append([name, f"{row['kept']} of {row['of']}", *flops, *(f"{part['of_all']:.2f}" for part in parts)])
    return table(head, lines)


def differences(rows: list[dict[str, Any]]) -> str:
    lines = [[row["kind"], f"`{row['spec']}`", f"{row['relative']:.3f}"] for row in rows]
    return table(["", "", "relative difference of the rows"], lines)


def tables() -> dict[str, dict[str, str]]:
    found, timed = read_json("repeats/results/tokens.json")["rows"], read_json("repeats/results/speed.json")
    made = {"tokens": tokens(found), "thresholds": thresholds(found), "finding": finding(found)}
    return {PAGE: made | {"speed": speed(timed["rows"]), "differences": differences(timed["differences"])}}


if __name__ == "__main__":
    for page, each in tables().items():
        fill(page, each)
