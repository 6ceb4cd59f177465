"""The web application: asyncio in front of the worker's thread."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gripvlm.errors import GripError
from gripvlm.serve.chat import ChatRequest, Refusal, chunk, completion, error_body, parse
from gripvlm.serve.metrics import Metrics
from gripvlm.serve.prompts import Preparer, Prompt
from gripvlm.serve.settings import Settings
from gripvlm.serve.worker import Answer, Job, Worker, requests_of, stopping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"
WITHOUT_KEY = ("/health", "/metrics")
"""Paths that need no API key."""

PREPARING = 4
"""Requests whose pictures are read at a time: each may take the memory of a large picture."""


def create_app(model: PreTrainedModel, processor: Any, settings: Settings) -> FastAPI:
    """The application that serves a model. The worker starts and ends with the application.

    Args:
        model: a supported transformers model; nothing else may run it meanwhile.
        processor: the model's own.
        settings: what is served and allowed.

    Raises:
        GripError: a pruner that cannot serve this model.
    """
    requests = requests_of(model, settings)
    metrics = Metrics()
    # A copy: a fast tokenizer fails where one thread decodes while another changes its padding.
    worker = Worker(model, copy.deepcopy(getattr(processor, "tokenizer", processor)), requests, settings, metrics)
    server = _Server(worker, Preparer(model, processor, requests, settings), settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        except asyncio.CancelledError:  # a second Ctrl-C: nothing is waited for, and there is nothing to report
            return
        await anyio.to_thread.run_sync(worker.close)

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="gripvlm", lifespan=lifespan, openapi_url=None)
    app.add_middleware(_Requests, server=server)
    app.state.server = server
    app.add_api_route(CHAT, server.chat, methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", server.metrics_page, methods=["GET"])

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> Response:
        return _refused(Refusal(f"{request.method} {request.url.path[:200]}: {error.detail}", status=error.status_code))

    return app


class _Server:
    """The endpoints, and what they share."""

    def __init__(self, worker: Worker, prepare: Preparer, settings: Settings, metrics: Metrics) -> None:
        self.worker, self.settings, self.metrics = worker, settings, metrics
        self._prepare = prepare
        self._keys = [_digest(key) for key in settings.keys]
        self._created = int(time.time())
        self._preparing: anyio.CapacityLimiter | None = None
        self.open_requests = 0
        """Chat requests that are being read, wait or run."""
        metrics.watch("gripvlm_queue_length", "Requests that wait for the model.", lambda: worker.waiting)
        metrics.watch("gripvlm_running", "Requests that run.", lambda: worker.running)
        metrics.watch("gripvlm_encode_cache_bytes", "Encoded pictures kept.", lambda: worker.encodings.bytes)
        if (controller := worker.controller) is not None:
            metrics.watch(
                "gripvlm_controller_keep", "Share kept for requests that name none.", lambda: controller.keep.value
            )

    # --- before an endpoint -------------------------------------------------------------------------------------

    def refusal(self, request: Request) -> Refusal | None:
        """Why a request is refused before anything of it is read."""
        path = request.scope["path"]
        if path not in WITHOUT_KEY and self._keys and not self._knows(request.headers.get("authorization", "")):
            return Refusal(
                "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
        limits = self.settings.limits
        most = limits.max_batch + limits.max_queue
        if is_chat(request) and self.open_requests >= most:
            batches = math.ceil(self.worker.waiting / limits.max_batch)
            seconds = min(60, max(1, math.ceil(self.worker.batch_seconds * batches)))
            return Refusal(
                f"{self.open_requests} requests are open, allowed are {most}: try again in {seconds} s",
                status=429,
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                retry_after=seconds,
            )
        return None

    def _knows(self, header: str) -> bool:
        kind, _, key = header.partition(" ")
        given = _digest(key.strip())
        # Digests, all of them, so that the time says nothing about a key.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return kind.lower() == "bearer" and any(found)

    # --- endpoints ----------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        status = self.worker.status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics_page(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        return JSONResponse(self._model()) if name == self.settings.model else _refused(self._no_model(name))

    def _model(self) -> dict[str, Any]:
        s = self.settings
        keep = [b.plain for b in s.ladder.budgets] if s.ladder is not None else s.keep.plain
        own = {"pruners": list(s.pruners), "keep": keep}
        return {"id": s.model, "object": "model", "created": self._created, "owned_by": "gripvlm", **own}

    def _no_model(self, name: str) -> Refusal:
        return Refusal(
            f"no model {name[:80]!r} here: ask for {self.settings.model!r}", status=404, code="model_not_found"
        )

    async def chat(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            arrived = time.perf_counter()
            if self._preparing is None:  # it belongs to the running event loop
                self._preparing = anyio.CapacityLimiter(PREPARING)
            chat, prompt = await anyio.to_thread.run_sync(self._read, body, limiter=self._preparing)
            results: asyncio.Queue[str | Answer | Exception] = asyncio.Queue()
            job = Job(prompt, _sender(results), arrived)
            request.state.job = job
            self.worker.submit(job)
            return await self._answer(request, chat, job, results)
        except Exception as error:  # noqa: BLE001  each becomes an answer
            return _refused(_refusal_of(error, request.state.id))

    def _read(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        """What a body asks for; takes too long for the event loop."""
        chat = parse(body)
        if chat.model != self.settings.model:
            raise self._no_model(chat.model)
        return chat, self._prepare(chat)

    async def _body(self, request: Request) -> bytes:
        most, body = self.settings.limits.body_bytes, bytearray()
        refusal = Refusal(f"the body has more than {most} bytes: send smaller pictures", status=413)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise refusal

        async def read() -> None:
            async for piece in request.stream():
                body.extend(piece)
                if len(body) > most:
                    raise refusal

        seconds = self.settings.limits.upload_seconds
        try:
            await asyncio.wait_for(read(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refusal(f"the body took more than {seconds:g} seconds: send it faster", status=408) from None
        return bytes(body)

    async def _answer(
        self, request: Request, chat: ChatRequest, job: Job, results: asyncio.Queue[str | Answer | Exception]
    ) -> Response:
        head = {"id": f"chatcmpl-{request.state.id}", "created": int(time.time()), "model": self.settings.model}
        # While nothing is sent, only reading tells that a client has left.
        left = asyncio.ensure_future(_until_left(request))
        try:
            first = await _next_result(left, results)
            if isinstance(first, Exception):
                raise first
            if chat.stream:
                return StreamingResponse(
                    self._stream(request, chat, head, first, results),
                    media_type="text/event-stream",
                    headers={"Cache-Control": "no-cache"},
                )
            text: list[str] = []
            result: str | Answer | Exception = first
            while isinstance(result, str):
                text.append(result)
                result = await _next_result(left, results)
        finally:
            left.cancel()
        if isinstance(result, Exception):
            raise result
        extra = {"gripvlm": _extra(job, result)}
        return JSONResponse(completion({**head, **extra}, "".join(text), result.reason, _usage(result)))

    async def _stream(
        self,
        request: Request,
        chat: ChatRequest,
        head: dict[str, Any],
        result: str | Answer | Exception,
        results: asyncio.Queue[str | Answer | Exception],
    ) -> AsyncIterator[str]:
        yield chunk(head, {"role": "assistant", "content": ""})
        while isinstance(result, str):
            yield chunk(head, {"content": result})
            result = await results.get()
        if isinstance(result, Exception):
            yield f"data: {json.dumps(error_body(_refusal_of(result, request.state.id)))}\n\n"
            return
        own = {**head, "gripvlm": _extra(request.state.job, result)}
        yield chunk(own, {}, result.reason)
        if chat.stream_options is not None and chat.stream_options.include_usage:
            yield chunk(own, None, usage=_usage(result))
        yield "data: [DONE]\n\n"


class _Requests:
    """The middleware around every request: its id, the API key, the limit of open requests, and what ends with it."""

    def __init__(self, app: ASGIApp, server: _Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        server, request = self._server, Request(scope)
        given = request.headers.get("x-request-id", "")
        request.state.id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        request.state.job, began = None, time.perf_counter()
        status = 499  # where nothing is sent, the client has left

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request.state.id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        refusal = server.refusal(request)
        admitted = refusal is None and is_chat(request)
        server.open_requests += admitted
        try:
            await (self._app if refusal is None else _refused(refusal))(scope, receive, sending)
        except asyncio.CancelledError:  # the server waits no longer: its grace is over, or Ctrl-C came twice
            if status == 499:
                await _refused(stopping())(scope, receive, sending)
        finally:
            server.open_requests -= admitted
            job: Job | None = request.state.job
            if job is not None and not job.ended:
                server.worker.cancel(job)
            if is_chat(request):
                server.metrics.request(status)
            seconds = time.perf_counter() - began
            logger.info("%s %s %r %d %.3f s", request.state.id, request.method, scope["path"], status, seconds)


def is_chat(request: Request) -> bool:
    return request.scope["path"] == CHAT and request.method == "POST"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(error_body(refusal), refusal.status, refusal.headers)


def _refusal_of(error: Exception, request: str) -> Refusal:
    """What the client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, GripError):
        return Refusal(str(error))
    if isinstance(error, ClientDisconnect):
        return _left()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Refusal(
            "the server ran out of memory: send fewer or smaller pictures, or a smaller keep",
            status=503,
            kind="server_error",
            retry_after=5,
        )
    logger.error("request %s failed", request, exc_info=error)
    return Refusal(f"the server failed; its log says why, under the request {request}", 500, kind="server_error")


def _sender(results: asyncio.Queue[str | Answer | Exception]) -> Any:
    """Puts what the worker's thread sends into a queue of this event loop."""
    loop = asyncio.get_running_loop()

    def send(result: str | Answer | Exception) -> None:
        try:
            loop.call_soon_threadsafe(results.put_nowait, result)
        except RuntimeError:  # the loop has ended, and its clients with it
            logger.debug("no one is there to send to")

    return send


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next_result(
    left: asyncio.Future[None], results: asyncio.Queue[str | Answer | Exception]
) -> str | Answer | Exception:
    """The next result, or a `Refusal` that no one reads, once the client has left."""
    result = asyncio.ensure_future(results.get())
    await asyncio.wait((left, result), return_when=asyncio.FIRST_COMPLETED)
    if result.done():
        return result.result()
    result.cancel()
    return _left()


def _left() -> Refusal:
    return Refusal("the client left", status=499, kind="cancelled")


def _usage(answer: Answer) -> dict[str, Any]:
    # Inside the language model the count is a mean over its layers, so not always a whole number.
    prompt = round(answer.prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.tokens,
        "total_tokens": prompt + answer.tokens,
        "visual_tokens": answer.visual,
        "visual_tokens_kept": round(answer.kept),
    }


def _extra(job: Job, answer: Answer) -> dict[str, Any]:
    """Which pruner and budget it was."""
    return {"pruner": job.prompt.pruner, "keep": None if answer.keep is None else answer.keep.plain}
