"""Writes docs/methods.md, docs/choosing.md, README's costs and all that `gripvlm list` shows; a test keeps them true.

python runs/methods_table.py
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs")]

import choosing  # noqa: E402

from gripvlm.models.families import FAMILIES  # noqa: E402
from gripvlm.models.grids import unknown  # noqa: E402
from gripvlm.pruners import get_pruner  # noqa: E402
from gripvlm.pruners.registry import _BUILT_IN, PrunerRow, _load, list_pruners  # noqa: E402
from gripvlm.tasks import task_names  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
README = ROOT / "README.md"
CHOOSING = ROOT / "docs" / "choosing.md"
MEASURED = ROOT / "src" / "gripvlm" / "cli" / "measured.json"
PLACES = {"input": "input", "llm": "in the LLM", "vision": "in the tower"}
KEPT = {"input": 0.125, "llm": 0.3, "vision": 0.3}  # of those measured, where most methods' intervals lie apart
GRIDS = {"input": "lab-grid", "llm": "lab-grid-llm", "vision": "lab-grid-llm"}
OLD = ("592255aa6b27", "9ca687be6f52", "a937ced80c71")
"""Commits of results before the methods that authors-choices.json holds to their authors' code were mended."""
CHANGED = {
    "lab-grid": ("vispruner", "hiprune:middle=1", "vscan_vision:shallow=0"),
    "lab-grid-llm": ("dart:layer=1", "sparsevlm", "pumer", "mustdrop_llm", "vscan:shallow=0"),
}
"""Of these, what the lab's grids measure."""
BEFORE = "{} measured before 2026-11-27, when the methods below *Held to the authors' code* were mended."
SCORE = (("score", 1), ("ci_low", 0), ("ci_high", 0))


def idea(name: str, made_by: Any) -> str:
    """What a method does, from the first line of its file, without its name in front."""
    first = (inspect.getdoc(inspect.getmodule(made_by)) or "").splitlines()[0].rstrip(".")
    named = name.split("_")[0] in first.split()[0].lower() and first.split()[0] != "Keep"
    text = first.split(": ", 1)[-1] if named else first
    return text[:1].lower() + text[1:]


def needs(row: Any, made_by: Any) -> str:
    """Fields of `VisualTokens`, and of `LLMTokens` in italics."""
    held = "what it wraps" if "wrapper" in row.source else "what its weights need"
    other = held if isinstance(getattr(made_by, "needs", None), property) else "-"
    return ", ".join([*row.needs, *(f"*{name}*" for name in row.llm_needs)]) or other


def result(name: str) -> dict[str, Any] | None:
    """A file of results/, None where it has not been measured."""
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def grid(name: str) -> list[dict[str, Any]]:
    """The means of a lab grid; of pruners that changed since, those of the run that measured them again."""
    later = [row for row in (result(f"{name}-later") or {"means": []})["means"] if row["pruner"] != "full"]
    again = {row["pruner"] for row in later}
    return [row for row in (result(name) or {"means": []})["means"] if row["pruner"] not in again] + later


def unmeasured() -> list[str]:
    """Pruners whose lab scores are of what they did before they were mended."""
    found = []
    for name, changed in CHANGED.items():
        one, later = result(name), result(f"{name}-later") or {"means": []}
        again = {row["pruner"] for row in later["means"]}
        if one is not None and one["header"]["git"]["commit"].startswith(OLD):
            found += [pruner for pruner in changed if pruner not in again]
    return found


def head(spec: str) -> str:
    """The pruner that a spec names."""
    return spec.partition(":")[0].partition("(")[0]


def scored(name: str, stage: str) -> dict[str, Any] | None:
    """The lab's mean of a pruner, as results/ have it; None where it was not measured."""
    keep = 1.0 if name == "full" else KEPT[stage]
    rows = [row for row in grid(GRIDS[stage]) if head(row["pruner"]) == name and row["keep"] == keep]
    return min(rows, key=lambda row: row["pruner"] != name, default=None)  # the bare name first


def score(name: str, stage: str) -> str:
    """The lab's mean with its confidence interval, and as what it was measured where that is not the bare name."""
    row = scored(name, stage)
    if row is None:
        return "-"
    value, low, high = (f"{100 * row[key]:.{digits}f}" for key, digits in SCORE)
    typed = row["pruner"].removeprefix(name).lstrip(":")
    return f"{value} [{low}-{high}]" + (f" `{typed}`" if typed else "")


def share(ratios: list[float] | None) -> str:
    """A ratio to the prefill in percent: the median and, in brackets, the smallest and the largest."""
    if ratios is None:
        return "-"
    median, low, high = (f"{100 * value:.2g}" if value < 0.1 else f"{100 * value:.0f}" for value in ratios)
    return f"{median} [{low}-{high}]"


def times(name: str, speed: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was measured of a pruner, one entry for each number of tokens and batch."""
    cells = speed["cells"] if speed else []
    return [row for cell in cells for spec, row in cell["pruners"].items() if head(spec) == name]


def speeds() -> dict[str, Any] | None:
    """results/pruner-speed.json, with the cells that pruner-speed-16.json measured in another run."""
    files = {name: found for name in ("pruner-speed", "pruner-speed-16") if (found := result(name)) is not None}
    if "pruner-speed" not in files:
        return None
    whole, *others = files.values()
    later = {(cell["n"], cell["batch"]): cell for other in others for cell in other["cells"]}
    cells = [later.get((cell["n"], cell["batch"]), cell) for cell in whole["cells"]]
    made_by = []
    for name, one in files.items():
        git = one["environment"]["git"]
        made_by.append((name, one["command"], git["commit"][:12] if git else "no checkout"))
    return {**whole, "cells": cells, "made_by": made_by}


def described(row: PrunerRow) -> dict[str, Any]:
    """What the registry says of a pruner, ready to print."""
    wraps = [option for option in row.options if option.kind is Any and option.required]  # typed in parentheses
    needs = {*(get_pruner(row.name).needs if row.name == "grip" else row.needs)}
    return {
        "stage": row.stage,
        "source": row.source,
        "trained": row.trained,
        "wraps": "wrapper" in row.source,
        "attention": bool(needs & {"vision_attention", "vision_given", "patches"}),
        "question": "question" in needs or row.stage == "llm",  # there the prompt has been read
        "grid": "grid" in needs,
        "options": [
            str(one) if one.typeable else f"{one.name}: from Python" for one in row.options if one not in wraps
        ],
    }


def measured() -> dict[str, Any]:
    """What `gripvlm list` shows, so that it need not import the pruners: what each needs and takes, its score, at what
    share of the tokens, and its share of a prefill.
    """
    speed = speeds()
    assert speed is not None, "no results/pruner-speed.json: python runs/pruner_speed.py writes it"
    whole = (result(GRIDS["input"]) or {"rows": []})["rows"]
    asked = sum(row["n"] for row in whole if row["pruner"] == "full")
    rows = {}
    for row in list_pruners():
        if row.name not in _BUILT_IN:
            continue
        shown: dict[str, Any] = described(row)
        if (found := scored(row.name, row.stage)) is not None:
            shown |= {key: round(found[key], 4) for key, _ in SCORE} | {"keep": found["keep"]}
            shown["measured_as"] = found["pruner"]
        if (cells := times(row.name, speed)) and cells[0]["ratio"]:
            shown["prefill_share"] = cells[0]["ratio"][0]
        rows[row.name] = shown
    return {
        "written_by": "python runs/methods_table.py",
        "files": [f"results/{name}.json" for name in sorted({*GRIDS.values(), "pruner-speed"})],
        "questions": asked,
        "advice": choosing.advice(),
        "costs": choosing.costs(),
        "share_of_7b": choosing.share_of_7b(),
        "tasks": task_names(),
        "prefill": {
            "tokens": speed["cells"][0]["n"],
            "parameters": speed["model"]["parameters"],
            "device": speed["environment"]["hardware"]["device"],
        },
        "pruners": rows,
    }


def timing(speed: Mapping[str, Any]) -> list[str]:
    """The section on time."""
    cells, model, where = speed["cells"], speed["model"], speed["environment"]
    on = where["hardware"]
    names = [f"n = {cell['n']}, batch {cell['batch']}" for cell in cells]
    lines = [
        "## Time of each pruner alone",
        "",
        "In percent of the prefill of the same images by a language model of "
        f"{model['parameters'] / 1e6:.0f} M weights ({model['hidden']} x {model['layers']}, {model['dtype']}), "
        f"measured in the same run on {on['processor']}, {on['threads']} threads, {on['device']}: median and "
        f"[smallest-largest] of {speed['repeats']} rounds. Kept are a ninth of the tokens, in the LLM a third on "
        "average. The tower's and the model's own work is not counted. Where the prefill was not measured there is no "
        "ratio, and the seconds are given.",
        "",
        f"| pruner | {' | '.join(names)} |",
        f"|---|{'---:|' * len(cells)}",
    ]
    for spec in cells[0]["pruners"]:
        rows = [cell["pruners"][spec] for cell in cells]
        shown = [f"{share(row['ratio'])} %" if row["ratio"] else f"{row['seconds'][0]:.2g} s" for row in rows]
        lines.append(f"| `{spec}` | {' | '.join(shown)} |")
    if any(commit.startswith(OLD) for _, _, commit in speed["made_by"]):
        lines += ["", BEFORE.format("All were")]
    for cell, named in zip(cells, names, strict=True):
        if "why" in cell["prefill"]:
            lines += ["", f"The prefill at {named} was not measured: {cell['prefill']['why']}."]
    lines += [
        "",
        *(f"`results/{name}.json`: `{command}` at {commit}." for name, command, commit in speed["made_by"]),
        "",
    ]
    return lines


def times_of(ratio: Mapping[str, float] | None) -> str:
    """A ratio of times: the median and, in brackets, the quartiles."""
    return "-" if ratio is None else "{median:.2f} [{low:.2f}-{high:.2f}]".format(**ratio)


def beside_authors(found: Mapping[str, Any]) -> list[str]:
    """The section on the same methods as their authors wrote them."""
    model, where = found["model"], found["environment"]
    on, commit = where["hardware"], where["git"]["commit"][:12] if where["git"] else "no checkout"
    lines = [
        "## Beside the authors' way",
        "",
        "The same methods after their papers' descriptions, in the way that their authors' code is known to work: "
        "whole attention matrices, eager layers, loops over tokens or images (`runs/authors_methods.py`). On the same "
        f"tensors in the same run: {model['architecture']} ({model['note']}), {model['dtype']}, {on['processor']}, "
        f"{on['threads']} threads, {on['device']}. Times of ours to theirs, below 1 where ours takes less: median and "
        f"[quartiles] of {found['repeats']} turns or more. Beside that, both to the same work without pruning (sdpa), "
        "and to its limit: the same rows dropped by a choice made beforehand. Prefills begin with the picture's rows. "
        "Same rows: how many of those that ours keeps theirs keeps too, all images and cuts together; both are our own "
        "writing, so what the authors' code keeps is another question (*Held to the authors' code*). In "
        "`sparsevlm-1.0` theirs also computes the rank that version 1.0 takes its counts from.",
        "",
        "| method | work | batch | ours to theirs | ours, theirs to unpruned | ours, theirs to the limit | same rows |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        of = [[times_of(row[f"{name}_of_{below}"]) for name in ("ours", "authors")] for below in ("unpruned", "limit")]
        pairs = [", ".join(pair) if pair != ["-", "-"] else "-" for pair in of]
        same = f"{row['same_tokens']['same']} of {row['same_tokens']['kept']}"
        cells = (f"`{row['method']}`", row["work"], row["batch"], times_of(row["ratio"]), *pairs, same)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    old = ["", BEFORE.format("The rows of `sparsevlm` were")] if commit.startswith(OLD) else []
    return [*lines, *old, "", f"`results/authors-way.json`: `{found['command']}` at {commit}.", ""]


def held_to_code() -> list[str]:
    """The section on what the authors' own code chose."""
    found = result("authors-choices")
    if found is None:
        return []
    lines = [
        "## Held to the authors' code",
        "",
        "What eight methods' published code chose on tensors that everyone can make anew (`runs/authors_cases.py`):",
        "their own functions, read from clones and run apart by `runs/authors_choices.py`. Ours, and a second",
        "implementation of each, are held to the same rows and merges by `tests/pruners/test_authors_choices.py`. Of `hired`",
        "only what each picture keeps of its share is compared: tiles' shares are a numbered departure. Where the code",
        "draws noise or goes through a Python set (`sparsevlm`, `dart`), it was made to take the raster's order, as",
        "ours does. `dart`'s repository is a fork, at its authors' own commit.",
        "",
        "| method | code | commit | cases, all equal |",
        "|---|---|---|---:|",
    ]
    for name, one in found["methods"].items():
        code = f"[{one['repository']}](https://github.com/{one['repository']})"
        cases = sum(len(run.get("cuts", [0])) for run in one["runs"] if "setting" not in run)
        lines.append(f"| `{name}` | {code} | `{one['commit'][:12]}` | {cases} |")
    costs = [run for run in found["methods"]["sparsevlm"]["runs"] if "setting" in run]
    said = ", ".join(f"{run['setting']}: {run['average']:.2f} ({run['counted']:.2f})" for run in costs)
    same, kept = (
        sum(run[key] for run in found["methods"]["dart"]["runs"]) for key in ("also_kept_in_set_order", "keep")
    )
    return [
        *lines,
        "",
        "SparseVLM's settings, the rows of 576 that its code gives a layer of 32 on average, and in brackets those it",
        f"counts, a layer that cuts by what it leaves: {said}.",
        f"DART: of {kept} tokens that are kept in raster order, {same} are kept in the order of a Python set too.",
        "",
        "`results/authors-choices.json`: `python runs/authors_choices.py FOLDER`.",
        "",
    ]


def page() -> str:
    """All of docs/methods.md."""
    speed, authors = speeds(), result("authors-way")
    lines = [
        "# Methods",
        "",
        "Written by `python runs/methods_table.py` from the registry and `results/`. Each file in",
        "`src/gripvlm/pruners/` has its paper's equation, its options, and every departure from the paper, numbered.",
        "",
        "Lab score: the mean over the lab's tasks ([zoo.md](zoo.md)), with its 95 % interval, at 12.5 % of the",
        "tokens; in the LLM and in the tower at 30 % of them; `full` at all. Time: percent of a prefill, n = 576, one",
        "image. `gripvlm list` shows both. The lab score here is of 100 questions a family, as in zoo.md; README and",
        "[grip-results.md](grip-results.md) ask the whole test sample, so that their scores differ a little.",
        "",
        "| name | what it does | needs | drops rows | trained | lab score | time | source |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for row in list_pruners():
        if row.name not in _BUILT_IN:  # other packages' are theirs to describe
            continue
        made_by = _load(row.name)
        timed = times(row.name, speed)
        time = f"{share(timed[0]['ratio'])} %" if timed and timed[0]["ratio"] else "-"
        cells = (
            f"`{row.name}`",
            idea(row.name, made_by),
            needs(row, made_by),
            PLACES[row.stage],
            "yes" if row.trained else "no",
            score(row.name, row.stage),
            time,
            row.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    sees = ", ".join(sorted(name for name, family in FAMILIES.items() if family.vision is not None))
    shortens = ", ".join(sorted(name for name, family in FAMILIES.items() if family.merges))
    drops = ", ".join(sorted(name for name, family in FAMILIES.items() if family.layers))
    flat = ", ".join(sorted(name for name, family in FAMILIES.items() if family.grid is unknown))
    if old := unmeasured():
        lines += ["", BEFORE.format(f"Lab scores of {', '.join(f'`{spec}`' for spec in old)} were")]
    lines += [
        "",
        "- `features`, `question`, `key`: every family.",
        f"- `grid`, rows in a plain raster: all but {flat}.",
        f"- `vision_attention`, `vision_given`, `patches`: {sees}.",
        f"- `groups`, merging in the vision tower: {shortens}, with a tower of CLIP's or SigLIP's blocks.",
        f"- In the LLM (needs in italics): {drops}. There `keep` is the average over the layers.",
        "- Towers without a CLS token (SigLIP, Qwen): where a method reads the CLS token's attention, it reads the",
        "  mean attention that each token receives.",
        "- `hiprune`, `vscan` and `vscan_vision` read a block of the vision tower by its number, from 0, by default",
        "  one of CLIP's 24; a tower with fewer blocks needs another: `hiprune:middle=1`, `vscan:shallow=0`.",
        "- Cuts in the LLM are those published for 32 layers (`pumer`: 12), at the same relative depth; `fastv`,",
        "  `dart` and `ptp` cut at the layer that `layer` says.",
        "- `cdpruner` reads CLIP's own text tower where it is given one, from Python:",
        "  `CDPruner(clip=ClipText(clip_model, tokenizer, questions))` with `gripvlm.models.clip.ClipText`.",
        "- Methods that merge rows can be attended to by size: `gripvlm.prune(model, 'visionzip', keep=64,",
        "  proportional_attention=True)` adds the logarithm of how many rows a token stands for to the language model's",
        "  scores for it (ToMe's proportional attention). Off by default; for sdpa and eager attention, and families",
        "  without linear attention or convolutions.",
        "- Wrappers are typed around others: `mmr(norm)`, `spread(visionzip):floor=0.5`, `ensemble(norm,divprune)`.",
        "",
    ]
    return "\n".join(
        [*lines, *held_to_code(), *(timing(speed) if speed else []), *(beside_authors(authors) if authors else [])]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(choosing.readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    CHOOSING.write_text(choosing.page(), encoding="utf-8")
    MEASURED.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    print(PAGE, CHOOSING, README, MEASURED, sep="\n")
