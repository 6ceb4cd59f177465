"""Tables of REPORT.md.

python -m experiments.families.analyze
"""

from __future__ import annotations

from typing import Any

from experiments.results import read_json, table
from experiments.tables import fill

STUDY = "families"
VERSIONS = ("5.23.0", "5.19.0")
HEAD = ["family", "1 keep all", "2 equals", "2 largest difference", "2 with videos", "3 exact", "4 positions"]
HEAD += ["5 batch = singles", "6 cache", "7 as before", "8 same choice", "9 inside the layers"]


def row(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """One family: the worse of sdpa and eager."""
    both = found["sdpa"], found["eager"]

    def worst(key: str, text: str | None = None) -> str:
        if key not in both[0]:
            return ""
        value = max(one[key] for one in both)
        same = text is None or all(one[text] for one in both)
        return (f"{value:.1e}" if value else "0") + ("" if same else ", text differs")

    def yes(key: str) -> str:
        return "yes" if all(one[key] for one in both) else "NO"

    full, fewer = both[0]["cache"]
    return [
        name,
        worst("keep_all", "keep_all_same_text"),
        both[0]["equals"],
        worst("dropping", "dropping_same_text"),
        worst("video"),
        yes("exact"),
        yes("positions"),
        worst("batch", "batch_same_text"),
        f"{full} → {fewer}",
        yes("model_as_before"),
        "yes" if both[0]["selection"] == both[1]["selection"] else "NO",
        worst("inside", "inside_same_text") or "refused",
    ]


def tables() -> dict[str, dict[str, str]]:
    page = {}
    for version in VERSIONS:
        families = read_json(f"{STUDY}/results/transformers-{version}.json")["families"]
        page[f"transformers-{version}"] = table(HEAD, [row(*item) for item in sorted(families.items())])
    return {f"experiments/{STUDY}/REPORT.md": page}


if __name__ == "__main__":
    for path, page in tables().items():
        fill(path, page)
