"""A load test of `gripvlm serve` on loopback, with the lab.

    OMP_NUM_THREADS=1 python -m experiments.serving.load               writes results/load.json; under five minutes
    OMP_NUM_THREADS=1 python -m experiments.serving.load --seconds 1   a trial; writes nothing

First 1, 8 and 32 clients, each of which asks again as soon as it has its answer, at keep 100, 25 and 10 %. Then
clients that come by themselves (Poisson), three times as many in the middle third, with and without a controller. The
server is a process of its own; the clients run in this one, so at least two cores should be free.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from experiments.results import STUDIES, write_json
from gripvlm.eval import environment
from gripvlm.tasks import Sample, Task, get_tasks

OUT = STUDIES / "serving/results/load.json"
CLIENTS, KEEPS, LADDER = (1, 8, 32), ("100%", "25%", "10%"), "50%,25%,12.5%"
LOAD = 0.6
"""Before it is tripled, in shares of what 32 clients get at the largest budget of the ladder."""
TARGET = 2.0
"""To the first token, in times the median of 8 clients at the largest budget of the ladder."""


@dataclass(frozen=True)
class Outcome:
    """One request: when it was sent, seconds to its first text and to its end, whether it was right, what it paid."""

    sent: float
    first: float
    seconds: float
    status: int
    right: bool = False
    keep: float = 0.0


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The URL of a server with these options."""
    command = [sys.executable, "-m", "gripvlm", "serve", "--pruners", "grip", "--port", "0", *options]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        tempfile.NamedTemporaryFile("r") as log,
        open(log.name, "w", encoding="utf-8") as writes,
        subprocess.Popen(command, stderr=writes, env=environ) as server,
    ):
        try:
            while not (found := re.search(r"running on (http://\S+)", log.read())):
                if server.poll() is not None:
                    raise SystemExit(f"the server did not start: {' '.join(command)}")
                log.seek(0)
                time.sleep(0.1)
            yield found[1]
        finally:
            server.terminate()
            server.wait(30)


class Asker:
    """Asks the lab's questions in a random order."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._all = [(task, sample) for task in get_tasks(["lab"]) for sample in task.samples]

    def body(self, keep: str | None) -> tuple[Task, Sample, dict[str, Any]]:
        task, sample = self._draw.choice(self._all)
        content: list[dict[str, Any]] = []
        for place in sample.pictures:
            picture = base64.b64encode(place.read_bytes()).decode()  # type: ignore[union-attr]
            content.append({"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{picture}"}})
        content.append({"type": "text", "text": task.prompt(sample)})
        body = {"model": "lab", "messages": [{"role": "user", "content": content}], "stream": True}
        body |= {"max_tokens": task.max_new_tokens, "stream_options": {"include_usage": True}}
        return task, sample, body if keep is None else {**body, "keep": keep}

    async def ask(self, client: httpx2.AsyncClient, keep: str | None) -> Outcome:
        task, sample, body = self.body(keep)
        sent, first, text, usage = time.perf_counter(), 0.0, "", None
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return Outcome(sent, time.perf_counter() - sent, time.perf_counter() - sent, answer.status_code)
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                # Its first event has the role alone, and is sent together with the first token.
                first = first or time.perf_counter() - sent
                part = json.loads(line.removeprefix("data: "))
                usage = part.get("usage") or usage
                text += "".join(choice["delta"].get("content", "") for choice in part["choices"])
        assert usage is not None, "the answer broke off"
        share = usage["visual_tokens_kept"] / usage["visual_tokens"]
        score = task.score(text, sample)
        return Outcome(sent, first, time.perf_counter() - sent, 200, score == 1, share)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def closed(url: str, clients: int, keep: str, seconds: float) -> dict[str, Any]:
    """So many clients for so long."""
    asker, outcomes, ends = Asker(0), [], time.perf_counter() + seconds
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        began = time.perf_counter()

        async def one() -> None:
            while time.perf_counter() < ends:
                outcomes.append(await asker.ask(client, keep))

        await asyncio.gather(*(one() for _ in range(clients)))
        taken = time.perf_counter() - began
    assert {outcome.status for outcome in outcomes} == {200}
    first = [outcome.first for outcome in outcomes]
    return {
        "clients": clients,
        "keep": keep,
        "requests": len(outcomes),
        "per_second": len(outcomes) / taken,
        "p50": quantile(first, 0.5),
        "p95": quantile(first, 0.95),
        "score": statistics.fmean(outcome.right for outcome in outcomes),
    }


async def tripled(url: str, rate: float, target: float, seconds: float) -> dict[str, Any]:
    """Clients that come `rate` times a second, three times as often in the middle third."""
    asker, draw, tasks = Asker(1), random.Random(2), []
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        began, now = time.perf_counter(), 0.0
        while (now := now + draw.expovariate(rate * (3 if 1 / 3 <= now / seconds < 2 / 3 else 1))) < seconds:
            await asyncio.sleep(max(0.0, began + now - time.perf_counter()))
            tasks.append(asyncio.create_task(asker.ask(client, None)))
        outcomes = await asyncio.gather(*tasks)
    served = [outcome for outcome in outcomes if outcome.status == 200]
    # Windows of a second in which any request came: on target where 95 % of it were, within a tenth.
    windows: dict[int, list[float]] = {}
    for outcome in outcomes:
        waited = outcome.first if outcome.status == 200 else float("inf")
        windows.setdefault(int(outcome.sent - began), []).append(waited)
    on_target = [quantile(waited, 0.95) <= 1.1 * target for waited in windows.values()]
    return {
        "requests": len(outcomes),
        "refused": sum(outcome.status == 429 for outcome in outcomes),
        "in_time": sum(outcome.first <= target for outcome in served) / len(outcomes),
        "seconds_on_target": statistics.fmean(on_target),
        "p50": quantile([outcome.first for outcome in served], 0.5),
        "p95": quantile([outcome.first for outcome in served], 0.95),
        "score": statistics.fmean(outcome.right for outcome in served),
        "keep": statistics.fmean(outcome.keep for outcome in served),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each step; default 10")
    seconds = parser.parse_args().seconds
    largest = LADDER.partition(",")[0]
    rows = []
    with serving("--keep", largest) as url:
        asyncio.run(closed(url, 8, largest, min(3, seconds)))  # everything is loaded, and pictures are cached
        for clients in CLIENTS:
            for keep in KEEPS:
                rows.append(asyncio.run(closed(url, clients, keep, seconds)))
                print(json.dumps(rows[-1]), flush=True)
        eight, full = (asyncio.run(closed(url, clients, largest, seconds)) for clients in (8, 32))
    target, rate = round(TARGET * eight["p50"], 3), LOAD * full["per_second"]
    arms = {}
    follow = ("--target-ms", f"{1000 * target:g}", "--ladder", LADDER)
    for name, options in {largest: (), "controller": follow}.items():
        with serving("--keep", largest, *options) as url:
            asyncio.run(closed(url, 8, "10%", min(3, seconds)))
            arms[name] = asyncio.run(tripled(url, rate, target, 6 * seconds))
            print(name, json.dumps(arms[name]), flush=True)
    content = {"study": "serving", "command": "OMP_NUM_THREADS=1 python -m experiments.serving.load", **environment()}
    content |= {"seconds": seconds, "rows": rows, "target": target, "rate": rate, "ladder": LADDER, "tripled": arms}
    if seconds >= 10:
        write_json(OUT, content)


if __name__ == "__main__":
    sys.exit(main())
