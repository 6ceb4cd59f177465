"""Two runs of the same questions: did anything get less accurate, or slower?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gripvlm.eval.journal import differences
from gripvlm.eval.results import Results
from gripvlm.eval.schema import ResultsError
from gripvlm.eval.statistics import interval
from gripvlm.eval.variants import FULL

__all__ = ["Verdict", "compare"]

_TIMED = ("batch_size", "dtype", "attention")
_ROUNDING = 1e-9
_SHOWN = 5


@dataclass(frozen=True)
class Verdict:
    """What `compare` found.

    Attributes:
        lines: a line a setting, then each regression, then the verdict, as printed.
        regressions: one line each; () where there is none.
    """

    lines: tuple[str, ...]
    regressions: tuple[str, ...]


def compare(old: Results, new: Results, tolerance: float = 0.0, slower: float = 1.5) -> Verdict:
    """Every setting of `old` against the same one of `new`, question by question.

    A setting's mean score over tasks may fall by `tolerance`; the interval of the difference (95 %,
    clustered by picture) is printed but does not excuse: the same code on the same machine gives
    the same answers. Time is the median over questions, divided by the full model's median in the
    same run, so that a machine that is busy or throttled cancels; it may be `slower` times what it was.
    A run on another device, processor or number of threads, or with another batch size, dtype or
    attention implementation has other ratios, so its times are shown and not judged.

    Args:
        tolerance: of the mean score, 0.01 is one point.
        slower: 1.5 lets a ratio of 0.6 become 0.9.

    Raises:
        ResultsError: another model, other weights, questions, positions or another shard; a setting
            of `old` that `new` has not; answers missing.
    """
    for one in (old, new):
        if one.records is None:
            raise ResultsError(f"the answers of {one.path} are not there ({one.missing}): copy them beside it")
    _same_run(old, new)
    timing, notes = _timing(old, new), _configured(old, new)
    tasks = list(dict.fromkeys(row["task"] for row in old.rows))
    settings = list(dict.fromkeys((row["pruner"], str(row["keep"])) for row in old.rows))
    there = {(row["pruner"], str(row["keep"])) for row in new.rows}
    if lacking := [f"{pruner} at {keep}" for pruner, keep in settings if (pruner, keep) not in there]:
        raise ResultsError(f"{new.path} has no {', '.join(lacking)}, which {old.path} has: measure the same settings")
    lines, found = (
        [f"{'setting':<34}{'score':>8}{'now':>8}  difference, points      answers changed    time / full"],
        [],
    )
    for pruner, keep in settings:
        label = f"{pruner} at {keep}"
        groups, before, after, lost, won = [], [], [], [], 0
        for task in tasks:
            a, b = old.of(task, pruner, keep), new.of(task, pruner, keep)
            names = sorted(a)
            change = [b[name]["score"] - a[name]["score"] for name in names]
            groups.append((change, [a[name]["image_id"] for name in names]))
            before.append(np.mean([a[name]["score"] for name in names]))
            after.append(np.mean([b[name]["score"] for name in names]))
            lost += [f"{task} {name}" for name, one in zip(names, change, strict=True) if one < 0]
            won += sum(one > 0 for one in change)
        difference = float(np.mean([np.mean(change) for change, _ in groups]))
        low, high = interval(groups, 0)
        ends = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        ratio, was = _ratio(new, tasks, pruner, keep), _ratio(old, tasks, pruner, keep)
        lines.append(
            f"{label:<34}{100 * np.mean(before):>8.2f}{100 * np.mean(after):>8.2f}  "
            f"{f'{100 * difference:+.2f}{ends}':<22}  {f'-{len(lost)} +{won}':<17}  {was:.2f} -> {ratio:.2f}"
        )
        if difference < -tolerance - _ROUNDING:
            some = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
            found.append(
                f"REGRESSION: {label} lost {-100 * difference:.2f} points (tolerance {100 * tolerance:g}): {some}"
            )
        if pruner != FULL and not timing and ratio > was * slower + _ROUNDING:
            found.append(
                f"REGRESSION: {label} takes {ratio:.2f} of the full model's time, was {was:.2f} (tolerance: "
                f"{slower:g} times)"
            )
    ending = f"{len(found)} regressions" if len(found) != 1 else "1 regression"
    if timing:
        notes.append(
            f"WARNING: speed is not judged, since times of other settings or machines do not compare ({timing})"
        )
    lines += [
        *notes,
        *found,
        (ending if found else "no regression") + (" in scores; speed not judged" if timing else ""),
    ]
    return Verdict(tuple(lines), tuple(found))


def _same_run(old: Results, new: Results) -> None:
    """Refuses runs whose answers do not belong to the same questions to the same model."""
    names = ["model", "tasks", "positions", "shard"]
    if old.header["dtype"] == new.header["dtype"]:  # the hash is of the weights as they were loaded
        names.insert(1, "weights")
    then, now = ({name: one.header.get(name, "none") for name in names} for one in (old, new))
    if then != now:
        what = "asked different questions" if then["model"] == now["model"] else "are of different models"
        raise ResultsError(f"{old.path} and {new.path} {what} ({differences(then, now)}): compare runs of one kind")


def _timing(old: Results, new: Results) -> str:
    """What differs of the settings and the machine that times depend on; "" where nothing does."""
    then, now = (
        {name: one.header.get(name) for name in _TIMED} | {"machine": " and ".join(sorted(_machines(one)))}
        for one in (old, new)
    )
    return differences(then, now)


def _machines(one: Results) -> set[str]:
    """Device, processor and threads; of a merged file, those of its parts."""
    heads = one.header.get("shards", [one.header])
    return {
        f"{head['device']} ({head['hardware'].get('processor')}, {head['hardware'].get('threads')} threads)"
        for head in heads
    }


def _configured(old: Results, new: Results) -> list[str]:
    """A line for each pruner that goes by the same name and has other options."""
    then, now = ({row["pruner"]: row["pruner_config"] for row in one.rows} for one in (old, new))
    return [
        f"WARNING: {pruner} is configured otherwise ({differences(config, now[pruner])})"
        for pruner, config in then.items()
        if now.get(pruner, config) != config
    ]


def _ratio(one: Results, tasks: list[str], pruner: str, keep: str) -> float:
    """The setting's median time a question / the full model's, mean over tasks."""
    return float(np.mean([_median(one, task, pruner, keep) / _median(one, task, FULL, "1.0") for task in tasks]))


def _median(one: Results, task: str, pruner: str, keep: str) -> float:
    return float(np.median([sum(record["seconds"].values()) for record in one.of(task, pruner, keep).values()]))
