"""Discrete-event simulation of 1 to 1,000 replicas of `gripvlm serve`, with the server's own controller.

    python -m experiments.serving.simulate     scenarios.toml, results/curves.json -> results/simulation.json; minutes

A replica serves as `gripvlm serve` does: it takes the waiting requests, at most `max_batch`, prunes them to the budget
that its controller names, gives all of them their first token, then the others, and only then takes the next batch. A
request that finds `max_batch + max_queue` open ones gets a 429, which counts as not in time. Requests go to the one of
two random replicas that has fewer of them ("power of two choices", Mitzenmacher 2001). Arrivals are Poisson with a rate
that varies (thinning, Lewis and Shedler 1979).

Left out: networks, clients that try again, pictures that are in the cache already (each is encoded), answers of
different lengths. All replicas are alike.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from experiments import results
from gripvlm.budget import Budget
from gripvlm.eval import environment
from gripvlm.serve.controller import Controller, Ladder

HERE = Path(__file__).parent
OUT = HERE / "results/simulation.json"
Numbers: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Curves:
    """Seconds that a replica takes, from what `measure.py` wrote.

    Attributes:
        tower: of one picture.
        prefill, step: by share kept, by number of requests in the batch; lines between the sizes measured.
    """

    tower: float
    prefill: Mapping[float, Mapping[int, float]]
    step: Mapping[float, Mapping[int, float]]

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Curves:
        sizes = sorted({row["batch"] for row in measured["rows"]})
        by_keep: dict[str, dict[float, dict[int, float]]] = {"prefill": {}, "step": {}}
        for name, found in by_keep.items():
            for row in measured["rows"]:
                found.setdefault(row["keep"], {})[row["batch"]] = row[name]
            for keep, points in found.items():
                found[keep] = {size: between(points, size) for size in range(1, sizes[-1] + 1)}
        return cls(measured["tower"], by_keep["prefill"], by_keep["step"])

    def batch(self, keep: float, size: int, tokens: int) -> tuple[float, float]:
        """Seconds from a batch's start to its first tokens, and to its end."""
        first = size * self.tower + self.prefill[keep][size]
        return first, first + (tokens - 1) * self.step[keep][size]


def between(points: Mapping[int, float], x: int) -> float:
    """The line between the two measured points around x."""
    low, high = max(p for p in points if p <= x), min(p for p in points if p >= x)
    return points[low] if low == high else points[low] + (points[high] - points[low]) * (x - low) / (high - low)


@dataclass(eq=False)
class Replica:
    """One server: those that wait, the batch that runs, and the controller, or the budget that never changes."""

    controller: Controller | None
    keep: float
    waiting: deque[float] = field(default_factory=deque)
    running: list[float] = field(default_factory=list)
    lost: bool = False
    run: int = 0
    """Of a batch: an end that belongs to an earlier one is that of a replica that was lost."""

    @property
    def open(self) -> int:
        return len(self.waiting) + len(self.running)


@dataclass(frozen=True)
class Fleet:
    """Replicas, and how one of them serves.

    Attributes:
        budgets: the ladder, the largest first; one budget for a fleet without controllers.
        target: seconds to the first token.
        tokens: of an answer.
    """

    replicas: int
    budgets: tuple[float, ...]
    target: float
    tokens: int
    max_batch: int
    max_queue: int


def simulate(
    curves: Curves, fleet: Fleet, arrivals: list[float], seed: int, outage: tuple[int, float, float] = (0, 0.0, 0.0)
) -> Numbers:
    """What requests at these times get; `outage`: how many replicas are away, from when to when.

    Returns:
        requests; refused and in_time, as shares of them; and of those served mean_keep, p50 and p95 of the time to the
        first token over the target, and `at KEEP`, the share that got each budget.
    """
    draw = random.Random(seed)
    ladder = Ladder(tuple(Budget(keep) for keep in fleet.budgets), fleet.target) if len(fleet.budgets) > 1 else None
    replicas = [
        Replica(None if ladder is None else Controller(ladder), fleet.budgets[0]) for _ in range(fleet.replicas)
    ]
    waits: list[float] = []
    refused, served = 0, dict.fromkeys(fleet.budgets, 0)
    events: list[tuple[float, int, int, int]] = []  # when, the order they were made in, replica or -1, its run
    made = 0

    def schedule(when: float, replica: int, run: int) -> None:
        nonlocal made
        made += 1
        heapq.heappush(events, (when, made, replica, run))

    def start(number: int, now: float) -> None:
        """The next batch of a replica that is free."""
        replica = replicas[number]
        if replica.lost or replica.running or not replica.waiting:
            return
        replica.running = [replica.waiting.popleft() for _ in range(min(fleet.max_batch, len(replica.waiting)))]
        keep = replica.keep if replica.controller is None else float(replica.controller.keep.value)
        first, end = curves.batch(keep, len(replica.running), fleet.tokens)
        for arrived in replica.running:
            waits.append(now + first - arrived)
            if replica.controller is not None:
                replica.controller.observe(arrived, now + first)
        served[keep] += len(replica.running)
        replica.run += 1
        schedule(now + end, number, replica.run)

    def route(arrived: float, now: float) -> None:
        """To the emptier of two replicas that are there."""
        nonlocal refused
        number = draw.randrange(fleet.replicas)
        other = draw.randrange(fleet.replicas)
        if replicas[number].lost or (not replicas[other].lost and replicas[other].open < replicas[number].open):
            number = other
        while replicas[number].lost:
            number = draw.randrange(fleet.replicas)
        if replicas[number].open >= fleet.max_batch + fleet.max_queue:
            refused += 1
            return
        replicas[number].waiting.append(arrived)
        start(number, now)

    away, gone, back = outage
    away = min(away, fleet.replicas - 1)  # someone must be there
    if away:
        schedule(gone, -1, 1)
        schedule(back, -1, 0)
    upcoming = iter(arrivals)
    arrival = next(upcoming, math.inf)
    while events or arrival < math.inf:
        if not events or arrival <= events[0][0]:
            route(arrival, arrival)
            arrival = next(upcoming, math.inf)
            continue
        now, _, number, run = heapq.heappop(events)
        if number >= 0:
            if replicas[number].run == run and not replicas[number].lost:
                replicas[number].running = []
                start(number, now)
            continue
        for replica in replicas[:away]:
            replica.lost = bool(run)
            if replica.lost:
                # The batch that runs counts as served; what waits is sent again.
                held, replica.waiting, replica.running = list(replica.waiting), deque(), []
                for arrived in held:
                    route(arrived, now)
    late = refused + sum(wait > fleet.target for wait in waits)
    assert len(waits) + refused == len(arrivals), "a request was lost"
    waits.sort()
    shares = {keep: count / max(len(waits), 1) for keep, count in served.items()}
    return {
        "requests": len(arrivals),
        "refused": refused / len(arrivals),
        "in_time": 1 - late / len(arrivals),
        "mean_keep": sum(keep * share for keep, share in shares.items()),
        "p50": quantile(waits, 0.5) / fleet.target,
        "p95": quantile(waits, 0.95) / fleet.target,
        **{f"at {keep:g}": share for keep, share in shares.items()},
    }


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.inf


# --- arrivals ---------------------------------------------------------------------------------------------------------


def load_at(shape: Mapping[str, Any]) -> Callable[[float], float]:
    """The load at a share of the run, in shares of what the replicas can serve at the largest budget."""
    base, factor = shape["base"], shape.get("factor", 1.0)

    def load(at: float) -> float:
        if shape.get("cycle"):
            return base * (1 + (factor - 1) * (1 - math.cos(2 * math.pi * at)) / 2)
        if "every" in shape:
            return base * (factor if at % shape["every"] < shape["share"] * shape["every"] else 1.0)
        return base * (factor if shape.get("from", 1.0) <= at < shape.get("to", 1.0) else 1.0)

    return load


def arrivals_of(shape: Mapping[str, Any], capacity: float, requests: int, seed: int) -> tuple[list[float], float]:
    """About so many times, ascending, at `capacity` x the shape's load; and how long the run is."""
    draw, load = random.Random(seed), load_at(shape)
    points = [load((i + 0.5) / 1000) for i in range(1000)]
    duration = requests / (capacity * statistics.fmean(points))
    top, times, now = max(points) * 1.001, [], 0.0
    while (now := now + draw.expovariate(capacity * top)) < duration:
        if draw.random() * top < load(now / duration):
            times.append(now)
    return times, duration


# --- the study --------------------------------------------------------------------------------------------------------


def summary(runs: list[Numbers]) -> dict[str, Any]:
    """Mean and 95 % t-interval over seeds of each number."""
    from scipy.stats import t

    found = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = {"mean": statistics.fmean(values), "half": float(half)}
    return found


def main() -> None:
    scenarios = tomllib.loads((HERE / "scenarios.toml").read_text(encoding="utf-8"))
    curves = Curves.of(results.read_json("serving/results/curves.json"))
    ladder = tuple(float(Budget(keep).value) for keep in scenarios["ladder"])
    size, tokens = scenarios["max_batch"], scenarios["tokens"]
    _, batch = curves.batch(ladder[0], size, tokens)
    capacity = size / batch  # requests a second that one replica serves at the largest budget
    arms = {scenarios["ladder"][0]: ladder[:1], scenarios["ladder"][-1]: ladder[-1:], "controller": ladder}

    def fleet(replicas: int, budgets: tuple[float, ...]) -> Fleet:
        return Fleet(replicas, budgets, scenarios["target"] * batch, tokens, size, scenarios["max_queue"])

    def run(shape: Mapping[str, Any], load: int, replicas: int, budgets: tuple[float, ...], seed: int) -> Numbers:
        requests = max(scenarios["requests"], 200 * load)
        arrivals, duration = arrivals_of(shape, capacity * load, requests, seed)
        away = math.ceil(shape["lost"] * replicas) if "lost" in shape else 0
        outage = (away, shape.get("from", 0) * duration, shape.get("to", 0) * duration)
        return simulate(curves, fleet(replicas, budgets), arrivals, seed, outage)

    rows = []
    for name, shape in scenarios["shape"].items():
        for replicas in scenarios["replicas"]:
            for arm, budgets in arms.items():
                seeds = [run(shape, replicas, replicas, budgets, seed) for seed in scenarios["seeds"]]
                rows.append({"shape": name, "replicas": replicas, "arm": arm, **summary(seeds)})
                print(name, replicas, arm, f"{rows[-1]['in_time']['mean']:.3f}", flush=True)

    machines = []
    for name, shape in scenarios["shape"].items():
        for arm, budgets in arms.items():
            # The fewest replicas with 95 % in time, for the same arrivals: doubled until enough, then halved between.
            low, high = 0, 1
            load = int(scenarios["machines_for"])

            def enough(replicas: int, shape: Any = shape, budgets: Any = budgets, load: int = load) -> bool:
                return all(run(shape, load, replicas, budgets, seed)["in_time"] >= 0.95 for seed in scenarios["seeds"])

            while not enough(high):
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if enough(middle) else (middle, high)
            machines.append({"shape": name, "arm": arm, "replicas": high, **run(shape, load, high, budgets, 0)})
            print("fewest", name, arm, high, flush=True)
    content = {"study": "serving", "command": "python -m experiments.serving.simulate", **environment()}
    content |= {
        "scenarios": scenarios,
        "batch_seconds": batch,
        "capacity": capacity,
        "rows": rows,
        "machines": machines,
    }
    results.write_json(OUT, content)


if __name__ == "__main__":
    sys.exit(main())
