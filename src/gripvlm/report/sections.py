"""The parts of a report: what was run, plots, scores, differences, speed, commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gripvlm.eval.results import Results
from gripvlm.eval.scores import Scores, differences_from, relative
from gripvlm.eval.stats import Estimate
from gripvlm.eval.variants import FULL
from gripvlm.report.blocks import Block, Commands, Facts, Heading, Sheet, Text
from gripvlm.report.figures import ALWAYS, plots, score_text
from gripvlm.report.points import Cell, Comparison, keep_text
from gripvlm.report.tables import short, unreached

__all__ = ["commands", "sections"]


def sections(comparison: Comparison, baseline: str, anchor: str) -> list[Block]:
    """How it was measured, plots, scores and what follows from them."""
    name = comparison.name
    missing = [str(one.missing) for one in comparison.results if one.missing is not None]
    blocks: list[Block] = [Heading(name), *_runs(comparison), *_absent(comparison)]
    if not comparison.keeps:
        return [*blocks, Text("No method was measured beside the full model."), _scores(comparison)]
    blocks += [*plots(comparison, anchor), Text(_about_time(comparison))]
    blocks += [Heading(f"Scores: {name}", 3), Text(_about_scores(comparison)), _scores(comparison)]
    if comparison.scores is None:
        blocks.append(
            Text(
                "Paired differences and relative accuracy are left out: they "
                f"need every answer, and {', '.join(f'`{one}`' for one in missing)} is not there."
            )
        )
    else:
        blocks += _seeds(comparison) + _relative(comparison, comparison.scores)
        blocks += _differences(comparison, comparison.scores, baseline)
    return blocks


def commands(comparison: Comparison) -> list[Block]:
    """What makes each point."""
    typed = Commands([(f"{p.label}: {score_text(p.mean)}", p.command) for p in comparison.points])
    return [Heading(f"Commands: {comparison.name}", 3), Text("What to type for each point alone."), typed]


def _absent(comparison: Comparison) -> list[Block]:
    """What every plot should show and these results have not."""
    there = {p.method.partition(":")[0] for p in comparison.points}
    missing = [name for name in ALWAYS if name not in there]
    if not missing:
        return []
    names = " and ".join(f"`{name}`" for name in missing)
    return [
        Text(
            f"Baseline missing: {names} {'was' if len(missing) == 1 else 'were'} not measured here, so nothing below "
            f"says whether a method is better. To measure: `gripvlm eval --pruners {','.join(missing)},...`."
        )
    ]


def _runs(comparison: Comparison) -> list[Block]:
    """How each file was measured."""
    blocks: list[Block] = []
    for number, one in enumerate(comparison.results):
        if len(comparison.results) > 1:
            blocks.append(Text(f"Run {number + 1}, `{one.path.name}`:"))
        blocks.append(Facts(_run(one)))
    return blocks


def _run(one: Results) -> list[tuple[str, str]]:
    head = one.header
    git = head["git"] or {}
    state = f"commit `{git['commit'][:10]}`" if git.get("commit") else "no checkout"
    state += " with uncommitted changes" if git.get("dirty") else ""
    counts = {row["task"]: row["n"] for row in one.rows if row["pruner"] == FULL}
    tasks = ", ".join(f"{short(task)} {n}" for task, n in counts.items())
    part = f"; shard {head['shard']} only" if head.get("shard") else ""
    part += f"; merged from {len(head['shards'])} shards" if head.get("shards") else ""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
    hardware = ", ".join(f"{name} {value}" for name, value in head["hardware"].items() if value)
    return [
        ("model", f"`{head['model']}`, weights `{head['weights']}`, {head['dtype']}"),
        ("questions", f"{sum(counts.values())}: {tasks}{part}"),
        ("command", f"`{head['command']}`"),
        (
            "settings",
            f"batch {head['batch_size']}, positions {head['positions']}, seed {head['seed']} (draw, bootstrap)",
        ),
        ("code", f"{state}; {versions}"),
        ("hardware", hardware),
        ("finished", head["finished"][:10]),
        *[("not measured", "; ".join(unreached(one.content)))] * bool(one.unreached),
    ]


def _about_time(comparison: Comparison) -> str:
    runs = "Each file's times are divided by its own full model's. " if len(comparison.results) > 1 else ""
    return (
        "Time is that of a question from pixels to answer (vision encoder, choosing tokens, prefill, decoding), "
        f"divided by the full model's, both of one run. {runs}Another machine, model or batch has other ratios."
    )


def _about_scores(comparison: Comparison) -> str:
    return (
        "Absolute scores in percent, with 95 % intervals from a bootstrap over pictures (whole pictures are drawn, "
        "with all of their questions in all tasks). Kept is the achieved share of visual tokens, asked what was typed. "
        "Time is relative to the full model's. `oracle` keeps each question's own evidence, which no method could know."
    )


def _scores(comparison: Comparison) -> Sheet:
    several = len(comparison.tasks) > 1
    head = ["method", "asked", "kept, %", "tokens", *(["mean"] if several else [])]
    head += [*(short(task) for task in comparison.tasks), "time"]
    rows = []
    for p in comparison.points:
        cells = [*([p.mean] if several else []), *p.cells]
        asked = "all" if p.full else keep_text(p.keep)
        rows.append(
            [p.method, asked, f"{100 * p.kept:.1f}", f"{p.tokens:.4g}", *map(score_text, cells), f"{p.ratio:.2f}"]
        )
    if comparison.blind is not None:
        *tasks, mean = comparison.blind
        blind = [f"{100 * value:.1f}" for value in ([mean] if several else []) + list(tasks)]
        rows.append(["no image", "-", "0", "0", *blind, "-"])
    return Sheet(head, rows, 2, frozenset(i for i, p in enumerate(comparison.points) if p.full))


def _seeds(comparison: Comparison) -> list[Block]:
    """The mean score of each seed, where a method has several."""
    several = [p for p in comparison.points if len(p.seeds) > 1]
    if not several:
        return []
    text = (
        "Methods with several seeds: their scores above are means over seeds, question by question, and intervals are "
        "over pictures with these seeds given. Each seed's mean score:"
    )
    width = max(len(p.seeds) for p in several)
    rows = [
        [p.method, keep_text(p.keep), *(f"{100 * v:.1f}" for v in p.seeds), *([""] * (width - len(p.seeds)))]
        for p in several
    ]
    return [Text(text), Sheet(["method", "asked", *(f"seed {i + 1}" for i in range(width))], rows, 2)]


def _by_budget(comparison: Comparison, values: dict[tuple[str, Any], str], first: Sequence[str] = ()) -> Sheet:
    """Methods down, budgets across."""
    methods = [*first, *(m for m in dict.fromkeys(p.method for p in comparison.points if not p.full) if m not in first)]
    keeps = comparison.keeps
    rows = [[m, *(values.get((m, keep), "") for keep in keeps)] for m in methods]
    rows = [row for row in rows if any(row[1:])]
    return Sheet(["method", *map(keep_text, keeps)], rows)


def _relative(comparison: Comparison, scores: Scores) -> list[Block]:
    estimates = relative(scores)
    if all(one is None for one in estimates):
        return [Text("Relative accuracy is left out: the full model scores 0 in a task.")]
    values = {
        (one.method, one.keep): _percent(found)
        for one, found in zip(scores.settings, estimates, strict=True)
        if found is not None and not one.full
    }
    text = (
        "Mean over tasks of score / the full model's score, in percent; the interval is of the ratio, on the same "
        "pictures. Not to be mixed with the absolute scores above."
    )
    return [Heading(f"Relative accuracy: {comparison.name}", 3), Text(text), _by_budget(comparison, values)]


def _differences(comparison: Comparison, scores: Scores, baseline: str) -> list[Block]:
    heading = Heading(f"Differences from {baseline}: {comparison.name}", 3)
    if baseline not in {one.method for one in scores.settings}:
        return [heading, Text(f"Left out: `{baseline}` was not measured here.")]
    found = differences_from(scores, baseline)
    if not found:
        return []
    values = {}
    for one in found:
        setting = scores.settings[one.setting]
        star = "*" if one.p_holm < 0.05 else ""
        values[setting.method, setting.keep] = f"{100 * one.mean.value:+.1f}{star}{_ends(one.mean)}"
    text = (
        f"Mean score minus that of `{baseline}` at the same budget, in points, question by question on the same "
        "pictures, with uncorrected 95 % intervals. A star: different from 0 at the 5 % level after Holm's correction "
        f"for all {len(found)} differences of this table (paired sign-flip test over {len(scores.images)} pictures, "
        "10,000 flips), so the chance that any star is wrong is at most 5 %."
    )
    return [heading, Text(text), _by_budget(comparison, values)]


def _percent(one: Estimate | None) -> str:
    return "-" if one is None else score_text(Cell(one.value, one.low, one.high))


def _ends(one: Estimate) -> str:
    """` [-1.0, +2.0]`, in points; nothing where there is no interval."""
    return "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
