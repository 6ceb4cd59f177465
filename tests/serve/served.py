"""The lab behind a server: requests, a client in this process, and a server of its own on loopback."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import httpx2
import uvicorn
from PIL import Image

from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.serve.app import create_app
from gripvlm.serve.settings import Limits, Settings

CHAT = "/v1/chat/completions"
PRUNERS = ("grip", "divprune", "random:seed=3", "fastv:layer=1", "full")


@cache
def lab_model() -> Any:
    return lab.load()


@cache
def questions() -> list[dict[str, Any]]:
    lines = (lab.SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def settings(keep: Any = 0.25, limits: dict[str, Any] | None = None, **changes: Any) -> Settings:
    return replace(Settings("lab", PRUNERS, Budget(keep), limits=Limits(**(limits or {}))), **changes)


def data_url(content: bytes, kind: str = "webp") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(width: int, height: int, colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return data_url(file.getvalue(), "png")


def lab_picture(row: dict[str, Any]) -> str:
    return data_url((lab.SAMPLE / "images" / row["image"]).read_bytes())


def body(text: str, *urls: str, **fields: Any) -> dict[str, Any]:
    """A request with one user message: the pictures, then the text."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return {"model": "lab", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def asked(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return body(row["question"], lab_picture(row), **fields)


@asynccontextmanager
async def client_of(chosen: Settings, model: Any = None, **headers: str) -> AsyncIterator[Any]:
    """A client of a server in this event loop; `client.server` is what its endpoints share."""
    app = create_app(*(model or lab_model()), chosen)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://lab", headers=headers) as client,
    ):
        client.server = app.state.server
        yield client


@contextmanager
def on_loopback(chosen: Settings) -> Iterator[tuple[str, Any]]:
    """A uvicorn server in a thread: its URL, and what its endpoints share."""
    app = create_app(*lab_model(), chosen)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    (address,) = [socket.getsockname() for one in server.servers for socket in one.sockets]
    try:
        yield f"http://127.0.0.1:{address[1]}", app.state.server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
