"""Ten thousand malformed requests, and memory over twenty thousand. Minutes:

python -m pytest -q -m slow tests/serve/test_many.py
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from served import CHAT, asked, body, client_of, picture, questions, settings

from gripvlm.serve.chat import ChatRequest

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MALFORMED, MANY = 10_000, 20_000
AT_A_TIME = 16
LEAVES: list[Any] = [None, True, 0, -1, 1.5, 1e400, 10**30, "", "x", "\ud800", "<image>", "0%", "data:,", [], {}, [[]]]


def anything(draw: random.Random, depth: int = 3) -> Any:
    """JSON of any shape."""
    kind = draw.random()
    if depth == 0 or kind < 0.6:
        return draw.choice(LEAVES)
    if kind < 0.8:
        return [anything(draw, depth - 1) for _ in range(draw.randrange(3))]
    return {draw.choice(("role", "content", "type", "text", "url", "")): anything(draw, depth - 1) for _ in range(2)}


def replaced(draw: random.Random, value: Any) -> Any:
    """A value in which something at a random depth is something else."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice([*value])
        return {**value, name: replaced(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        i = draw.randrange(len(value))
        return [*value[:i], replaced(draw, value[i]), *value[i + 1 :]]
    return anything(draw)


def malformed(draw: random.Random, good: dict[str, Any]) -> bytes:
    """A request that is wrong in one of five ways; now and then it is right after all."""
    kind = draw.randrange(5)
    if kind == 0:
        return json.dumps(replaced(draw, good)).encode()
    if kind == 1:
        return json.dumps({**good, draw.choice([*ChatRequest.model_fields, "tools"]): anything(draw)}).encode()
    content = json.dumps(good).encode()
    if kind == 2:
        return content[: draw.randrange(len(content))]
    if kind == 3:
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 9)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    return draw.randbytes(draw.randrange(80))


def requests(draw: random.Random) -> list[dict[str, Any]]:
    """What is spoiled: short, so that most of a request is its structure."""
    small = picture(1, 1)
    return [body("is it?", small, max_tokens=1, keep=8), body("is it?", small, small, max_tokens=1, pruner="grip")]


async def in_turn(count: int, send: Any) -> None:
    """`send(i)` for i below count, some at a time."""
    numbers = iter(range(count))

    async def one() -> None:
        for i in numbers:
            await send(i)

    await asyncio.gather(*(one() for _ in range(AT_A_TIME)))


async def test_ten_thousand_malformed_requests():
    draw, seen = random.Random(0), {}
    good = requests(draw)
    async with client_of(settings()) as client:

        async def send(i: int) -> None:
            answer = await client.post(CHAT, content=malformed(draw, draw.choice(good)))
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        await in_turn(MALFORMED, send)
        assert sum(seen.values()) == MALFORMED
        assert seen[400] > 0.8 * MALFORMED
        assert (client.server.open_requests, client.server.worker.waiting) == (0, 0)
        assert (await client.post(CHAT, json=asked(questions()[0]))).status_code == 200


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to read the memory of a process")
async def test_memory_over_twenty_thousand_requests():
    """A quarter with pictures of the sample, more than the cache holds; a quarter of text; half malformed."""
    draw = random.Random(1)
    good, rows = requests(draw), questions()
    async with client_of(settings(limits={"cache_mb": 1})) as client:

        async def send(i: int) -> None:
            if i % 4 == 0:
                row = rows[draw.randrange(len(rows))]
                answer = await client.post(CHAT, json=asked(row, max_tokens=1, keep=draw.choice((0.1, 8, "50%"))))
                assert answer.status_code == 200
            elif i % 4 == 1:
                request = {"model": "lab", "messages": [{"role": "user", "content": f"is it {i}?"}], "max_tokens": 1}
                assert (await client.post(CHAT, json=request)).status_code == 200
            else:
                await client.post(CHAT, content=malformed(draw, draw.choice(good)))

        await in_turn(MANY // 10, send)  # caches of torch and of Python fill
        before = resident()
        await in_turn(MANY, send)
        assert resident() - before < 20 * 2**20
        assert client.server.worker.encodings.bytes <= 1_000_000
