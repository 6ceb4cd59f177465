"""What the writers of pages need of recorded answers: read them, and compare two methods question by question."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gripvlm.eval import interval

ROOT = Path(__file__).parent.parent
Scored = dict[str, tuple[float, str]]
"""Question -> (score, image)."""
Answers = dict[tuple[str, str, str], Scored]
"""(task, pruner, keep) -> questions."""


def read(name: str, renamed: Mapping[str, str] | None = None) -> Answers:
    """The answers of results/NAME; pruners in `renamed` go by another name."""
    found: Answers = defaultdict(dict)
    with gzip.open(ROOT / "results" / f"{name}.samples.jsonl.gz", "rt") as file:
        for text in file:
            record = json.loads(text)
            if "score" in record:
                pruner = (renamed or {}).get(record["pruner"], record["pruner"])
                found[record["task"], pruner, str(record["keep"])][record["id"]] = record["score"], record["image_id"]
    return found


def difference(pairs: Sequence[tuple[Scored, Scored | None]]) -> tuple[float, float, float]:
    """Mean over tasks of (mine - theirs), mine alone where there is no other, and its 95 % interval over pictures."""
    groups = []
    for mine, theirs in pairs:
        values = [score - (theirs[i][0] if theirs is not None else 0.0) for i, (score, _) in mine.items()]
        groups.append((values, [image for _, image in mine.values()]))
    low, high = interval(groups, 0)
    if low is None or high is None:
        raise SystemExit("too few pictures for an interval: nothing is written")
    return sum(sum(values) / len(values) for values, _ in groups) / len(groups), low, high


def points(mean: float, low: float, high: float) -> str:
    """`+1.2 [-0.3, +2.5]` of shares."""
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
