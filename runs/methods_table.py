"""Writes the tables of docs/methods.md from the registry: `python runs/methods_table.py`; a test keeps them true."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from gripvlm.models.families import FAMILIES  # noqa: E402
from gripvlm.pruners.registry import _BUILT_IN, _load, list_pruners  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
PLACES = {"input": "input", "llm": "in the LLM", "vision": "in the tower"}


def idea(name: str, made_by: Any) -> str:
    """What a method does, from the first line of its file, without its name in front."""
    first = (inspect.getdoc(inspect.getmodule(made_by)) or "").splitlines()[0].rstrip(".")
    named = name.split("_")[0] in first.split()[0].lower() and first.split()[0] != "Keep"
    text = first.split(": ", 1)[-1] if named else first
    return text[:1].lower() + text[1:]


def needs(row: Any, made_by: Any) -> str:
    """Fields of `VisualTokens`, and of `LayerTokens` in italics."""
    inside = sorted(getattr(made_by, "layer_needs", ()))
    held = "what it wraps" if "wrapper" in row.source else "what its weights need"
    other = held if isinstance(getattr(made_by, "needs", None), property) else "-"
    return ", ".join([*row.needs, *(f"*{name}*" for name in inside)]) or other


def page() -> str:
    """All of docs/methods.md."""
    lines = [
        "# Methods",
        "",
        "Written by `python runs/methods_table.py` from the registry. Each file in `src/gripvlm/pruners/` has its",
        "paper's equation, its options, and every departure from the paper, numbered.",
        "",
        "| name | what it does | needs | drops rows | trained | source |",
        "|---|---|---|---|---|---|",
    ]
    for row in list_pruners():
        if row.name not in _BUILT_IN:  # other packages' are theirs to describe
            continue
        made_by = _load(row.name)
        trained = "yes" if getattr(made_by, "trained", False) else "no"
        cells = (f"`{row.name}`", idea(row.name, made_by), needs(row, made_by), PLACES[row.stage], trained, row.source)
        lines.append(f"| {' | '.join(cells)} |")
    sees = ", ".join(sorted(name for name, family in FAMILIES.items() if family.vision is not None))
    shortens = ", ".join(sorted(name for name, family in FAMILIES.items() if family.merges))
    drops = ", ".join(sorted(name for name, family in FAMILIES.items() if family.layers))
    lines += [
        "",
        "- `features`, `question`, `key`: every family. `grid`: where an image's rows are a plain raster.",
        f"- `vision_attention`, `vision_given`, `patches`: {sees}.",
        f"- `groups`, merging in the vision tower: {shortens}, with a tower of CLIP's or SigLIP's blocks.",
        f"- In the LLM (needs in italics): {drops}. There `keep` is the average over the layers.",
        "- Towers without a CLS token (SigLIP, Qwen): where a method reads the CLS token's attention, it reads the",
        "  mean attention that each token receives.",
        "- `hiprune`, `vscan` and `vscan_vision` read a block of the vision tower by its number, by default that of",
        "  CLIP's 24; a tower with fewer blocks needs another: `hiprune:middle=1`, `vscan:shallow=0`.",
        "- Cuts in the LLM are those published for 32 layers (`pumer`: 12), at the same relative depth; `fastv`,",
        "  `dart` and `ptp` cut at the layer that `layer` says.",
        "- `cdpruner` reads CLIP's own text tower where it is given one, from Python:",
        "  `CDPruner(clip=ClipText(clip_model, tokenizer, questions))` with `gripvlm.models.clip.ClipText`.",
        "- Methods that merge rows can be attended to by size: `gripvlm.prune(model, 'visionzip', keep=64,",
        "  size_attention=True)` adds the logarithm of how many rows a token stands for to the language model's",
        "  scores for it (ToMe's proportional attention). Off by default; for sdpa and eager attention, and families",
        "  without linear attention or convolutions.",
        "- Wrappers are typed around others: `mmr(norm)`, `spread(visionzip):floor=0.5`, `ensemble(norm,divprune)`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
