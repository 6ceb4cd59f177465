"""What a GPU took, from results/gpu-*.json: a section of docs/speed.md and a paragraph of README.

Made by `runs/gpu_checks.py`; numbers of time and memory alone, as the weights are random.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from write_results import line

__all__ = ["loaded", "on_a_gpu", "paragraph", "spread_text", "table"]

RESULTS = Path(__file__).parent.parent / "results"
SHAPES = {"llava-1.5-7b": "LLaVA-1.5-7B's shape", "qwen2.5-vl-7b": "Qwen2.5-VL-7B's shape"}
GIB = 2**30


def loaded(name: str) -> Any:
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows), ""]


def spread_text(value: dict[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    if value is None:
        return "-"
    low, middle, high = (f"{scale * value[name]:.{digits}f}" for name in ("low", "median", "high"))
    return f"{middle} [{low}, {high}]"


def found() -> dict[str, Any]:
    return {name: one for name in SHAPES if (one := loaded(f"gpu-h200-bench-{name}.json")) is not None}


def where(result: dict[str, Any]) -> str:
    about, model = result["environment"], result["model"]
    versions = about["versions"]
    return (
        f"{about['hardware']['device']}, {model['dtype']}, {model['attention']} attention, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit `{about['git']['commit']}`"
    )


def of_batch(result: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["batch"] == batch and row["kind"] != "limit"]


def shares(rows: list[dict[str, Any]], pruner: str) -> str:
    """`0.5 to 0.7`, over budgets, of the first token's time."""
    each = [row["to_full"]["first_token"]["median"] for row in rows if row["pruner"] == pruner]
    return f"{min(each):.2f} to {max(each):.2f}"


def timed(name: str, result: dict[str, Any]) -> list[str]:
    cells = result["cells"]
    lines = [f"### {SHAPES[name]}", ""]
    for cell in cells:
        rows = []
        for row in of_batch(result, cell["batch"]):
            full = row["kind"] == "full"
            times, scale, digits = (row["seconds"], 1000.0, 0) if full else (row["to_full"], 1.0, 2)
            rows.append(
                [
                    "unpruned, ms" if full else f"{row['pruner']}, {row['kept']:.0f} of {row['visual_tokens']:.0f}",
                    *(spread_text(times[phase], scale, digits) for phase in ("prefill", "first_token", "whole")),
                    "-" if full else spread_text(times["added"], 100, 1),
                    f"{row['peak_memory'] / GIB:.1f}",
                    f"{row['kv_bytes'] / 1e6:.0f}",
                    str(row["turns"]),
                ]
            )
        cut = (
            ""
            if cell["runs_done"] == cell["runs_asked"]
            else (f" (cut off by the time it had: {cell['runs_done']} of {cell['runs_asked']} runs)")
        )
        head = ["", "prefill", "first token", "end to end", "added, %", "peak, GiB", "cache, MB", "turns"]
        lines += [f"Batch {cell['batch']}, {cell['prompt']} text tokens{cut}:", "", *table(head, rows)]
    said = [one for one in result["sentences"] if one.startswith("Batch")]
    done = "finished" if result["finished"] else "not finished (`finished: false`): what was asked for and is not here"
    more = [] if result["finished"] else ["had no time left."]
    lines += [*(f"> {sentence}" for sentence in said), "", " ".join([f"The run was {done}", *more]), ""]
    return [*lines, *fitted(name, result)]


def fitted(name: str, result: dict[str, Any]) -> list[str]:
    """The largest batch: of a run of its own where there is one, else of the times' run."""
    own = loaded(f"gpu-h200-fit-{name}.json")
    if own is not None and own["fits"]:
        rest = "" if own["finished"] else " The time ended before all was found."
        about = own["environment"]["git"]
        commit = f" Commit `{about['commit']}`." if about else ""
        return [f"> {sentence}{rest}{commit}" for sentence in own["sentences"]] + [""]
    if not result["fits"]:
        return ["The largest batch was looked for and not found in the time there was.", ""]
    rows = [
        f"{row['fits']} {'unpruned' if row['kind'] == 'full' else 'with ' + row['setting']} (not {row['fails']})"
        for row in result["fits"]
    ]
    rest = "" if len(result["fits"]) > 1 else "; the time ended before the pruned one was found"
    return [f"Largest batch that the memory holds: {'; '.join(rows)}{rest}.", ""]


def honest(results: dict[str, Any]) -> list[str]:
    """What the tables say, in sentences."""
    lines = []
    for name, result in results.items():
        batches = [cell["batch"] for cell in result["cells"]]
        few = of_batch(result, batches[0])
        full = few[0]["seconds"]
        told = [row["to_full"]["whole"] for row in few[1:] if row["pruner"] == "grip"]
        faster = sum(one["high"] < 1 for one in told)
        added = [100 * row["to_full"]["added"]["median"] for row in few[1:]]
        limits = [row for row in result["rows"] if (row["batch"], row["kind"]) == (batches[0], "limit")]
        least = spread_text(min(limits, key=lambda row: row["kept"])["to_full"]["whole"])
        lines.append(
            f"- {SHAPES[name]}, batch {batches[0]}: the first token comes after {shares(few, 'divprune')} of the "
            f"unpruned time with divprune and {shares(few, 'grip')} with grip; end to end grip is faster at "
            f"{faster} of {len(told)} budgets by both quartiles, where a model that received the fewest tokens "
            f"for nothing takes {least}: a gain beyond that is noise between turns. "
            f"Pruning adds {min(added):.0f} to {max(added):.0f} % of a prefill of "
            f"{1000 * full['prefill']['median']:.0f} ms, which falls little with fewer tokens: "
            "starting kernels takes the time, not arithmetic."
        )
    result = results.get("llava-1.5-7b")
    if result is not None:
        last = result["cells"][-1]["batch"]
        row = min((one for one in of_batch(result, last) if one["pruner"] == "grip"), key=lambda one: one["kept"])
        ratio = row["to_full"]
        lines.append(
            f"- {SHAPES['llava-1.5-7b']}, batch {last}: at {100 * row['keep']:g} % of the tokens grip is "
            f"{1 / ratio['whole']['median']:.2f}x as fast end to end and {1 / ratio['first_token']['median']:.2f}x to "
            f"the first token, and adds {100 * ratio['added']['median']:.1f} % of the unpruned prefill."
        )
    return [*lines, ""]


def trained() -> list[str]:
    result = loaded("gpu-h200-train.json")
    if result is None:
        return []
    rows = []
    for step in result["steps"]:
        kind = step.get("teacher") or step.get("relaxation") or ""
        minutes = f"{60 * step['step_minutes'][0]:.1f}" if step["step_minutes"] else "-"
        rows.append([f"{step['stage']} {kind}".strip(), f"{step['peak_gib']:.1f}", minutes, step["failed"] or "done"])
    one, commit = result["steps"][0], result["environment"]["git"]["commit"]
    failed = " Peak memory of a step that failed is what it had taken by then."
    return [
        "### One step of training",
        "",
        f"Every stage once, for a frozen model of {SHAPES[result['model']]}, {one['images']} pictures with "
        f"{one['questions']} questions each; weights {result['weights_gib']:.1f} GiB. Commit `{commit}`."
        f"{failed if any(step['failed'] for step in result['steps']) else ''}",
        "",
        *table(["", "peak, GiB", "step, s", "outcome"], rows),
    ]


def tested() -> list[str]:
    result = loaded("gpu-h200-tests.json")
    if result is None:
        return []
    files: dict[str, dict[str, int]] = {}
    for one in result["tests"]:
        counts = files.setdefault(one["test"].partition("::")[0], {"passed": 0, "failed": 0, "skipped": 0})
        counts[one["outcome"]] += 1
    commit = result["environment"]["git"]["commit"]
    rows = [[f"`{name}`", *(str(count) for count in counts.values())] for name, counts in files.items()]
    skips = [
        one["why"].rpartition("Skipped: ")[2].rstrip("')") for one in result["tests"] if one["outcome"] == "skipped"
    ]
    skipped = f" Skipped: {'; '.join(sorted(set(skips)))}." if skips else ""
    failed = " Why some failed: `results/gpu-h200-tests.json`." if result["failed"] else ""
    return [
        "### Tests on the GPU",
        "",
        f"Tests marked `gpu`. Commit `{commit}`.{skipped}{failed}",
        "",
        *table(["", "passed", "failed", "skipped"], rows),
    ]


def on_a_gpu() -> list[str]:
    results = found()
    if not results:
        return []
    lines = [
        "## On a GPU (H200, bf16, random weights of 7B shapes)",
        "",
        f"{where(next(iter(results.values())))}. Weights are random: this is time and memory, never accuracy. Times of "
        "pruned runs are shares of the unpruned model's in the same turn, median [quartiles]; `added` is pruner, "
        "dropping and checks in percent of the unpruned prefill. Files: `results/gpu-h200-*.json`, made by "
        "`runs/gpu_checks.py`.",
        "",
        *honest(results),
    ]
    for name, result in results.items():
        lines += timed(name, result)
    return [*lines, *trained(), *tested()]


def paragraph() -> list[str]:
    """README's sentence, in lines; none where there is no result."""
    if (result := found().get("llava-1.5-7b")) is None:
        return []
    first, last = (result["cells"][at]["batch"] for at in (0, -1))
    row = min((one for one in of_batch(result, last) if one["pruner"] == "grip"), key=lambda one: one["kept"])
    alone = of_batch(result, first)
    whole, token = row["to_full"]["whole"], row["to_full"]["first_token"]
    text = (
        f"On one {result['environment']['hardware']['device']}, with random weights of LLaVA-1.5-7B's shape in "
        f"bfloat16: {last} prompts at once with `grip` at {100 * row['keep']:g} % of the tokens take "
        f"{whole['median']:.2f} [{whole['low']:.2f}, {whole['high']:.2f}] of the unpruned time end to end and "
        f"{token['median']:.2f} of it to the first token. {'One prompt alone' if first == 1 else f'{first} prompts'} "
        f"comes to its first token after {shares(alone, 'grip')} of the unpruned time: there the starting of kernels "
        "takes the time ([docs/speed.md](docs/speed.md))."
    )
    return ["", *textwrap.wrap(text, 118, break_on_hyphens=False, break_long_words=False)]
