"""The table of docs/methods.md, from the registry and from what `gripvlm list` shows."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from gripvlm.pruners.registry import _BUILT_IN, PrunerRow, _load, list_pruners

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/methods.md"
MEASURED = ROOT / "src/gripvlm/cli/measured.json"
STAGES = {"input": "input", "llm": "in the LLM", "vision": "in the tower", "pixels": "ahead of the tower"}
HEAD = ("name", "what it does", "reads", "drops", "trained", "lab score", "time", "source")


def idea(row: PrunerRow) -> str:
    """What a method does, from the first line of its file, without its name in front; of its class in a shared file."""
    file = _BUILT_IN[row.name].partition(":")[0]
    shared = sum(source.startswith(f"{file}:") for source in _BUILT_IN.values()) > 1
    described = _load(row.name) if shared else inspect.getmodule(_load(row.name))
    first = (inspect.getdoc(described) or "").splitlines()[0].rstrip(".")
    word = first.split()[0]
    named = row.name.split("_")[0] in word.lower() and word != "Keep"
    text = first.split(": ", 1)[-1] if named else first
    return text[:1].lower() + text[1:]


def reads(row: PrunerRow) -> str:
    """Fields of `VisualTokens`, and of `LLMTokens` in italics."""
    varies = isinstance(getattr(_load(row.name), "needs", None), property)
    held = "what it wraps" if "wrapper" in row.source else "what its weights need"
    return ", ".join([*row.needs, *(f"*{name}*" for name in row.llm_needs)]) or (held if varies else "-")


def score(shown: dict[str, Any]) -> str:
    """Percent right on the lab with its interval, and the options it was measured with."""
    if "score" not in shown:
        return "-"
    options = re.sub(r"^\w+:?", "", shown["measured_as"])
    interval = f"{100 * shown['ci_low']:.0f}-{100 * shown['ci_high']:.0f}"
    return f"{100 * shown['score']:.1f} [{interval}]" + (f" `{options}`" if options else "")


def tables() -> dict[str, dict[str, str]]:
    """Page -> its tables, as Markdown."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["pruners"]
    lines = [HEAD, ("---",) * len(HEAD)]
    for row in list_pruners():
        if row.name not in _BUILT_IN:  # other packages' are theirs to describe
            continue
        shown = measured[row.name]
        share = f"{100 * shown['prefill_share']:.2g} %" if "prefill_share" in shown else "-"
        trained = "yes" if row.trained else "no"
        cells = (STAGES[row.stage], trained, score(shown), share, row.source)
        lines.append((f"`{row.name}`", idea(row), reads(row), *cells))
    return {PAGE: {"methods": "\n".join(f"| {' | '.join(cells)} |" for cells in lines)}}
