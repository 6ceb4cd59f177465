"""docs/speed.md and docs/overhead.png: every number in them comes from results/*.json; what is not there is left out.

python runs/write_speed.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gpu_tables import loaded, on_a_gpu, spread_text, table

from gripvlm.eval.frontier import time_to_accuracy
from gripvlm.eval.results import read_results
from gripvlm.eval.scores import scores_of

ROOT = Path(__file__).parent.parent
RESULTS, DOC = ROOT / "results", ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
PHASES = ("vision", "pruner", "overhead", "other", "prefill")
WITHIN = 0.01
SHAPES = {
    "lab": "The lab's model",
    "llava-0.5b": "CLIP-L/14-336 and Qwen2-0.5B, random weights",
    "llava-0.5b-batch": "The same, batches of 1 and 4",
}


def made_by(result: dict[str, Any]) -> str:
    about = result.get("environment", result)
    git, hardware = about["git"], about["hardware"]
    commit = f"`{git['commit'][:10]}`{' (dirty)' if git['dirty'] else ''}" if git else "an installed version"
    return (
        f"Command: `{result['command']}`. Commit: {commit}. {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads, {hardware['device']}."
    )


# --- what pruning adds -------------------------------------------------------------------------------------


def overhead() -> list[str]:
    found = {name: loaded(f"overhead-{name}.json") for name in ("before", "after")}
    if None in found.values():
        return []
    middle: dict[tuple[str, str, str], dict[str, float]] = {}
    spread: dict[tuple[str, str, str], list[float]] = {}
    for name, result in found.items():
        for batch, pruners in result["turns"][0].items():
            for pruner in pruners:
                turns = [turn[batch][pruner] for turn in result["turns"]]
                middle[name, batch, pruner] = {p: statistics.median(t[p] for t in turns) for p in turns[0]}
                spread[name, batch, pruner] = [t["overhead"] + t["other"] for t in turns]
    picture(middle)
    rows = []
    for _, batch, pruner in (key for key in middle if key[0] == "before"):
        cells = [f"`{pruner}`, batch {batch}"]
        for name in ("before", "after"):
            one, ends = middle[name, batch, pruner], spread[name, batch, pruner]
            added = statistics.median(ends)
            cells += [f"{one['pruner']:.2f}", f"{added:.2f} [{min(ends):.2f}, {max(ends):.2f}]"]
        ratios = [a / b for a, b in zip(spread["after", batch, pruner], spread["before", batch, pruner], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        rows.append(cells)
    turns = len(found["after"]["turns"])
    head = ["", "pruner, before", "rest, before", "pruner, after", "rest, after", "rest, after / before"]
    return [
        "## What a call adds, before and after",
        "",
        f"Milliseconds a sample on the lab's model at 12.5 % of the tokens, median of {turns} turns [least, most]. "
        "`rest` is everything but vision encoder, pruner and prefill: checks, the layout of the prompt, dropping. "
        "Ratios are of turns that followed each other; where the most is above 1, a turn was slower than before. What "
        "was changed, with a prediction for each step: [log.md](log.md), `What a call adds`.",
        "",
        "![Milliseconds of each phase before and after](overhead.png)",
        "",
        *table(head, rows),
        f"Made by `runs/overhead.sh`. Before: commit `{found['before']['git']['commit'][:10]}`. After: "
        f"{made_by(found['after']).split('. ', 1)[1]}",
        "",
    ]


def picture(middle: dict[tuple[str, str, str], dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    batches = list(dict.fromkeys(batch for _, batch, _ in middle))
    pruners = list(dict.fromkeys(pruner for *_, pruner in middle))
    figure, axes = plt.subplots(1, len(batches), figsize=(11, 4.2), layout="constrained")
    shades = dict(zip(PHASES, ("#b8c4d0", "#d1495b", "#edae49", "#f4d58d", "#30638e"), strict=True))
    for axis, batch in zip(axes, batches, strict=True):
        names = []
        for place, pruner in enumerate(pruners):
            for half, name in enumerate(("before", "after")):
                left, height = 0.0, len(pruners) * 2 - (2 * place + half) + (0.18 if half else 0.0)
                for phase in PHASES:
                    wide = middle[name, batch, pruner][phase]
                    label = phase if not place and not half else None
                    axis.barh(height, wide, left=left, color=shades[phase], height=0.75, label=label)
                    left += wide
                names.append((height, f"{pruner}, {name}"))
        full = statistics.median(
            m["full"] + m["vision"] for (n, b, _), m in middle.items() if (n, b) == ("after", batch)
        )
        axis.axvline(full, color="black", lw=1, ls=":")
        top = axis.get_xaxis_transform()
        axis.text(full, 0.98, "unpruned", va="top", ha="right", rotation=90, fontsize=8, transform=top)
        axis.set_yticks([height for height, _ in names], [text for _, text in names], fontsize=8)
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xlabel("milliseconds a sample to the first token", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), fontsize=8)
    figure.savefig(DOC.parent / "overhead.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


# --- end to end -------------------------------------------------------------------------------------------


def end_to_end() -> list[str]:
    lines: list[str] = []
    for name, title in SHAPES.items():
        if (result := loaded(f"bench-cpu-{name}.json")) is None:
            continue
        lines += [f"### {title}", ""]
        for batch, prompt in dict.fromkeys((row["batch"], row["prompt"]) for row in result["rows"]):
            mine = [row for row in result["rows"] if (row["batch"], row["prompt"]) == (batch, prompt)]
            rows = []
            for row in mine:
                if row["failed"] or row["kind"] == "full":
                    continue
                full, limit = row["to_full"], row["to_limit"] or {}
                rows.append(
                    [
                        f"{row['pruner'] or 'limit'}, {row['kept']:.0f} of {row['visual_tokens']:.0f}",
                        spread_text(full["prefill"]),
                        spread_text(full["first_token"]),
                        spread_text(full["whole"]),
                        spread_text(limit.get("prefill")),
                        spread_text(limit.get("first_token")),
                        spread_text(full["added"], 100, 1) if row["kind"] == "pruned" else "-",
                    ]
                )
            head = ["", "prefill", "first token", "whole", "prefill / limit", "first token / limit", "added, %"]
            lines += [f"Batch {batch}, {prompt} text tokens:", "", *table(head, rows)]
        lines += [*(f"> {sentence}" for sentence in result.get("sentences", ())), "", *per_sample(result), made_by(result), ""]
    if not lines:
        return []
    return [
        "## End to end on this CPU",
        "",
        "Times as a share of the unpruned model's in the same turn, median [quartiles]; `limit` is a model that "
        "received so few visual tokens for nothing. `added`: pruner, dropping and checks, in percent of the "
        "unpruned prefill. [bench.md](bench.md) defines the phases.",
        "",
        *large(),
        *lines,
    ]


def large() -> list[str]:
    """The scorer's share of a model too large to be timed here."""
    if (result := loaded("grip-speed.json")) is None:
        return []
    share = 100 * result["scorer_share_of_7b_prefill_flops"]
    text = f"By FLOPs, Grip's scorer takes {share:.2f} % of the prefill of a 7B model (576 visual and 64 text tokens; "
    return [text + "`results/grip-speed.json`).", ""]


def per_sample(result: dict[str, Any]) -> list[str]:
    """How what pruning adds to a sample changes with the batch."""
    batches = sorted({row["batch"] for row in result["rows"]})
    if len(batches) < 2:
        return []
    few, many, rows = batches[0], batches[-1], []
    for row in result["rows"]:
        if row["batch"] != many or row["failed"] or row["kind"] != "pruned":
            continue
        same = ("prompt", "pruner", "keep")
        one = next(r for r in result["rows"] if r["batch"] == few and all(r[key] == row[key] for key in same))
        cells = []
        for phases in (("pruner", "overhead", "other"), ("prefill",), ("first_token",)):
            cells.append(
                sum(row["seconds"][p]["median"] for p in phases)
                / many
                / (sum(one["seconds"][p]["median"] for p in phases) / few)
            )
        rows.append([f"{row['pruner']}, {row['kept']:.0f} tokens", *(f"{cell:.2f}" for cell in cells)])
    text = f"Time a sample at batch {many} / at batch {few}:"
    return [text, "", *table(["", "added", "prefill", "first token"], rows)]


# --- equal accuracy, rollouts -----------------------------------------------------------------------------


def equal_time() -> list[str]:
    if not (RESULTS / "equal-time.json").exists():
        return []
    found = read_results(RESULTS / "equal-time.json")
    scores = scores_of([found])
    lines = []
    heuristic = [keep for keep in scores.keeps if any(one.heuristic and one.keep == keep for one in scores.settings)]
    for keep in (None, *heuristic):
        number, times = time_to_accuracy(scores, keep, WITHIN)
        one = scores.settings[number]
        who = "the full model" if keep is None else f"the best training-free pruner at {100 * keep:g} %, `{one.method}`"
        lines += [f"Against {who} ({100 * scores.means[number].mean():.1f} %):", ""]
        rows = [
            [
                f"`{t.method}`" + ("" if t.setting is None else f" at {100 * scores.settings[t.setting].keep:g} %"),
                f"{t.ratio:.2f} [{t.low:.2f}, {t.high:.2f}]" if t.setting is not None else "not reached",
            ]
            for t in times
        ]
        lines += table(["", "time ratio"], rows)
    return [
        "## Time to equal accuracy on the lab",
        "",
        f"Seconds a question, everything included, of each method's fastest setting that is within {100 * WITHIN:g} "
        "point of the reference, divided by the reference's: below 1 is faster. 95 % interval from a bootstrap over "
        "pictures in which reference and settings are chosen anew.",
        "",
        *lines,
        *bounds(found.means),
        made_by(found.header),
        "",
    ]


def bounds(means: list[dict[str, Any]]) -> list[str]:
    """What no choice of tokens can make shorter."""
    some = [row for row in means if row["pruner"] not in ("full", "blind") and row["seconds_total"]]
    fastest = min(some, key=lambda row: row["seconds_total"])
    vision, whole = 1000 * fastest["seconds_vision"], 1000 * fastest["seconds_total"]
    full = 1000 * next(row["seconds_total"] for row in means if row["pruner"] == "full")
    return [
        f"The vision encoder takes {vision:.1f} of the {whole:.1f} ms a question of the fastest setting and of the "
        f"unpruned model's {full:.1f}: no choice of tokens can be faster than {vision / full:.2f} of the unpruned "
        "model here. For a model of usual size, whose language model is large beside its scorer, see above.",
        "",
    ]


def compiled() -> list[str]:
    if (result := loaded("static-shapes.json")) is None:
        return []
    rows = [
        [f"{way}, {row['length']} tokens", f"{row['first']:.2f}", spread_text(row["later"], 1000, 1)]
        for way, lengths in result["ways"].items()
        for row in lengths
    ]
    return [
        "## A compiled prefill, used again",
        "",
        f"The lab's model, {result['batch']} prompts, {result['keep']} visual tokens each; requests of three text "
        f"lengths, one after the other. Padded: to a multiple of {result['multiple']}. First request of a length in "
        "seconds, compiling included; later ones in milliseconds, median [quartiles].",
        "",
        *table(["", "first, s", "later, ms"], rows),
        made_by(result),
        "",
    ]


def main() -> None:
    text = DOC.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    block = "\n".join([*overhead(), *end_to_end(), *on_a_gpu(), *equal_time(), *compiled()])
    DOC.write_text(f"{text[:begin]}\n\n{block.strip()}\n\n{text[end:]}")


if __name__ == "__main__":
    main()
