"""One JSON a (variant, seed): what was run, and which questions were answered right.

A study's `results/<variant>/seed<N>.json` holds

- `study`, `variant`, `seed`, and `pruner`, as `gripvlm eval` takes it;
- `training`: settings, minutes, validation scores, where something was trained;
- `evaluation`: command, commit, versions, hardware, number of questions, dtype, batch size;
- `scores`: budget -> family of questions (and `mean`) -> share of right answers;
- `seconds`: budget -> phase -> seconds a question; `seconds_unpruned`: the unpruned model's, in the same run;
- `correct`: family -> budget -> one character a question, `1` where the answer is right;
- `probability`: family -> budget -> a number a question, the probability of the right answer in thousandths (newer
  files only).

The questions stand in the same order in every file of a study; `results/questions.json` names them. A question
`0012-03` is about picture `0012`, so that intervals can be taken over pictures.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from gripvlm.eval import interval, read_results

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "experiments"
BUDGETS = ("0.5", "0.25", "0.125", "0.06", "0.03", "0.015")
PHASES = ("total", "vision", "pruner", "overhead", "prefill", "decode")
KEPT_HEADER = ("command", "git", "versions", "hardware", "dtype", "batch_size", "limit", "weights")


def read_json(path: Path | str) -> Any:
    """A JSON file; a relative path starts at `experiments/`."""
    return json.loads((STUDIES / path).read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Result:
    """One (variant, seed)."""

    content: dict[str, Any]
    questions: dict[str, list[str]]

    @property
    def budgets(self) -> list[str]:
        return list(self.content["scores"])

    def score(self, budget: str, family: str = "mean") -> float:
        return self.content["scores"][budget][family]

    def correct(self, budget: str) -> dict[str, np.ndarray]:
        """Family -> [questions] of 0 and 1. The unpruned model has one budget, which stands for all."""
        budget = "1.0" if self.budgets == ["1.0"] else budget
        return {name: np.array([*map(int, bits[budget])]) for name, bits in self.content["correct"].items()}


def probability(result: Result, budgets: str) -> dict[str, np.ndarray]:
    """Family -> [questions] probabilities of the right answer, the mean over budgets with commas."""
    found = {}
    for family, values in result.content["probability"].items():
        found[family] = np.mean([np.array(values[b].split(), float) / 1000 for b in budgets.split(",")], axis=0)
    return found


@cache
def load(folder: str) -> dict[str, list[Result]]:
    """Variant -> results by seed, of a folder such as `grip_ablation/results`."""
    results = defaultdict(list)
    questions = {name: ids.split() for name, ids in read_json(f"{folder}/questions.json").items()}
    for path in sorted((STUDIES / folder).glob("*/seed*.json")):
        results[path.parent.name].append(Result(read_json(path), questions))
    return dict(results)


def average(results: Sequence[Result], budget: str, family: str = "mean") -> float:
    """Mean over seeds."""
    return mean(result.score(budget, family) for result in results)


def over_pictures(
    first: Sequence[Result],
    budget: str,
    second: Sequence[Result] = (),
    of: Callable[[Result, str], dict[str, np.ndarray]] = Result.correct,
) -> tuple[float, float, float]:
    """Mean over families and seeds of first (minus second), and its 95 % interval from a bootstrap over pictures.

    Args:
        of: what is compared, by family: right answers, or `probability`.
    """
    questions = first[0].questions
    groups = []
    for family, ids in questions.items():
        values = np.mean([of(result, budget)[family] for result in first], axis=0)
        if second:
            values = values - np.mean([of(result, budget)[family] for result in second], axis=0)
        groups.append((values, [name.partition("-")[0] for name in ids]))
    low, high = interval(groups, 0)
    if low is None or high is None:
        raise ValueError("too few pictures for an interval")
    return float(np.mean([values.mean() for values, _ in groups])), low, high


def common_seeds(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    by_seed = {result.content["seed"]: result for result in second}
    return [(result, by_seed[seed]) for result in first if (seed := result.content["seed"]) in by_seed]


def over_seeds(pairs: Sequence[tuple[Result, Result]], budget: str) -> tuple[float, float, float]:
    """Mean difference, and the 95 % t-interval of that mean over training seeds, these questions given."""
    return t_interval([first.score(budget) - second.score(budget) for first, second in pairs])


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent values, and its 95 % t-interval."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half


def share(budget: str) -> str:
    return f"{100 * float(budget):g} %"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(estimate: tuple[float, float, float]) -> str:
    """`+1.2 [-0.3, +2.5]`, in points."""
    middle, low, high = (f"{100 * value:+.1f}" for value in estimate)
    return f"{middle} [{low}, {high}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns after the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_csv(path: Path, found: dict[str, list[Result]]) -> None:
    """All scores, one a line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["variant", "seed", "keep", "family", "score"])
        for variant, seeds in found.items():
            for result in seeds:
                for budget, families in result.content["scores"].items():
                    rows.writerows([variant, result.content["seed"], budget, *item] for item in families.items())


def plot_by_budget(axis: Any, found: dict[str, list[Result]], styles: dict[str, str]) -> None:
    """A line a variant, over a logarithmic axis of budgets."""
    where = [100 * float(budget) for budget in BUDGETS]
    for name, style in styles.items():
        axis.plot(where, [100 * average(found[name], budget) for budget in BUDGETS], style, ms=4, label=name)
    axis.set(xscale="log", xlabel="visual tokens kept, %", ylabel="right answers, %", xticks=where)
    axis.set_xticks([], minor=True)
    axis.set_xticklabels([f"{value:g}" for value in where])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)


def score_table(found: dict[str, list[Result]], budgets: Sequence[str], order: str) -> str:
    """Right answers in percent, by pruner and budget, the best at `order` first, with its interval over pictures.

    found: pruner -> its seeds; `full` and `oracle`, where they are there, stand on top.
    """
    names = sorted(
        found, key=lambda name: (name not in ("full", "oracle"), name == "oracle", -average_at(found[name], order))
    )
    rows = []
    for name in names:
        whole = name == "full"
        cells = [percent(average_at(found[name], budget)) for budget in budgets]
        _, low, high = over_pictures(found[name][:1], order)
        rows.append(["all tokens" if whole else f"`{name}`", *cells, f"{100 * low:.0f} to {100 * high:.0f}"])
    return table(["", *map(share, budgets), f"95 % at {share(order)}"], rows)


def average_at(results: Sequence[Result], budget: str) -> float:
    """`average`; the unpruned model has one budget, which stands for all."""
    return average(results, "1.0" if results[0].budgets == ["1.0"] else budget)


def slug(spec: str) -> str:
    """A folder's name for a pruner: `mmr(norm)` -> `mmr_norm`."""
    return re.sub(r"[^\w.-]+", "_", spec).strip("_")


def split(file: Path, folder: Path, about: dict[str, Any] | None = None, names: dict[str, str] | None = None) -> None:
    """Writes an evaluation with its answers as one JSON a pruner (and seed) under `folder`.

    Args:
        file: what `gripvlm eval` wrote; its samples file lies beside it.
        about: fields for every file, such as study, seed, training.
        names: pruner -> variant, where that is not `slug(pruner)`; others are left out if it is given.
    """
    found = read_results(file)
    assert found.records is not None, f"{file} has no answers beside it"
    answers: dict[str, dict[str, dict[str, dict[str, bool]]]] = defaultdict(lambda: defaultdict(dict))
    for record in found.records.values():
        family = record["task"].rpartition("/")[2]
        answers[record["pruner"]][family].setdefault(str(record["keep"]), {})[record["id"]] = record["score"] == 1
    questions = {family: [*bits["1.0"]] for family, bits in answers["full"].items()}
    if not (folder / "questions.json").exists():
        write_json(folder / "questions.json", {family: " ".join(ids) for family, ids in questions.items()})
    # In the order of the run before: that of a run in shards is another.
    stored = {family: ids.split() for family, ids in read_json(folder / "questions.json").items()}
    assert {family: {*ids} for family, ids in stored.items()} == {family: {*ids} for family, ids in questions.items()}
    questions = stored
    for pruner, families in answers.items():
        if pruner == "blind" or (names is not None and pruner not in names):
            continue
        spec, _, seed = pruner.partition(":seed=")
        rows = [row for row in (*found.rows, *found.means) if row["pruner"] == pruner]
        content = {"schema": "gripvlm.experiment/1", "study": "", "variant": (names or {}).get(pruner, slug(spec))}
        content |= {"seed": int(seed or 0), "pruner": spec, "pruner_config": rows[0]["pruner_config"], **(about or {})}
        content["evaluation"] = {key: found.header[key] for key in KEPT_HEADER}
        content["evaluation"]["questions"] = sum(map(len, questions.values()))
        scores: dict[str, dict[str, float]] = defaultdict(dict)
        for row in rows:
            scores[str(row["keep"])][row["task"].rpartition("/")[2]] = round(row["score"], 9)
        content |= {"scores": scores, "trained": rows[0].get("trained", False)}
        if pruner == "full":
            for name in ("blind", "majority"):
                content[name] = {row["task"].rpartition("/")[2]: row[name] for row in rows}
        content["seconds"] = {
            str(row["keep"]): {phase: round(row[f"seconds_{phase}"], 6) for phase in PHASES}
            for row in rows
            if row["task"] == "mean"
        }
        whole = next(row for row in found.means if row["pruner"] == "full")
        content["seconds_unpruned"] = round(whole["seconds_total"], 6)
        content["correct"] = {
            family: {keep: "".join(str(int(right[one])) for one in questions[family]) for keep, right in bits.items()}
            for family, bits in families.items()
        }
        write_json(folder / content["variant"] / f"seed{content['seed']}.json", content)


if __name__ == "__main__":  # python -m experiments.results EVALUATION.json lab_check/results
    split(Path(sys.argv[1]), STUDIES / sys.argv[2], {"study": sys.argv[2].partition("/")[0]})
