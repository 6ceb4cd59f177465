"""The server as a process would meet it: over sockets, with OpenAI's client, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from served import CHAT, asked, lab_model, on_loopback, questions, settings

from gripvlm.serve.app import create_app


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[str, Any]]:
    with on_loopback(settings(keys=("secret",))) as found:
        yield found


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers go on to their full length, slowly enough for a client to leave in between."""
    model = lab_model()[0]
    monkeypatch.setattr("gripvlm.serve.worker.end_tokens", lambda model: frozenset())
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    yield
    hook.remove()


def test_openai_s_client(place):
    url, _ = place
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["lab"]
    row = questions()[11]
    request = {name: value for name, value in asked(row).items() if name != "keep"}
    answer = client.chat.completions.create(**request, extra_body={"keep": "50%", "pruner": "grip"})
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.visual_tokens_kept == 128
    parts = list(
        client.chat.completions.create(
            **request, extra_body={"keep": 128}, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
    assert parts[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="keeps nothing"):
        client.chat.completions.create(**request, extra_body={"keep": 0})
    with pytest.raises(openai.NotFoundError, match="ask for 'lab'"):
        client.chat.completions.create(**{**request, "model": "x"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def waits_until(condition: Any) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.usefixtures("endless")
def test_clients_that_leave_free_their_rows_and_the_others_get_their_answers(stream):
    """Each leaving client closes its socket in the middle of its answer."""
    with on_loopback(settings(limits={"max_batch": 4})) as (url, server):
        address = re.sub("^http://", "", url).split(":")
        stay = {**asked(questions()[0]), "max_tokens": 60}
        with ThreadPoolExecutor(8) as pool:
            stays = [pool.submit(httpx2.post, url + CHAT, json=stay, timeout=60) for _ in range(2)]
            for row in questions()[:6]:
                body = json.dumps({**asked(row), "max_tokens": 500, "stream": stream}).encode()
                with socket.create_connection((address[0], int(address[1]))) as leaving:
                    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                    leaving.sendall(head.encode() + body)
                    leaving.settimeout(0.3)
                    with contextlib.suppress(TimeoutError):
                        leaving.recv(1000)
            answers = [each.result() for each in stays]
        waits_until(lambda: server.open_requests == 0 and server.worker.running == 0)
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [60, 60]
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
        page = httpx2.get(f"{url}/metrics").text
        assert "gripvlm_cancelled_total 6.0" in page


def test_bodies_that_are_cut_off_or_never_end():
    with on_loopback(settings(limits={"upload_seconds": 0.3})) as (url, server):
        address = url.removeprefix("http://").split(":")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + '{"model": '
        with socket.create_connection((address[0], int(address[1]))) as slow:
            slow.sendall(head.encode())
            slow.settimeout(10)
            assert b"408" in slow.recv(1000)
        with socket.create_connection((address[0], int(address[1]))) as cut:
            cut.sendall(head.encode())
        waits_until(lambda: server.open_requests == 0)
        assert httpx2.post(url + CHAT, json=asked(questions()[0])).status_code == 200


@pytest.mark.usefixtures("endless")
def test_a_server_that_stops_ends_what_runs():
    rows = questions()[:3]
    results: list[Any] = []
    with on_loopback(settings()) as (url, server):
        threads = [
            threading.Thread(
                target=lambda row=row: results.append(httpx2.post(url + CHAT, json=asked(row), timeout=60))
            )
            for row in rows
        ]
        for thread in threads:
            thread.start()
        waits_until(lambda: server.worker.running + server.worker.waiting == len(rows))
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in results] == [200] * 3


def test_the_command_serves_and_stops_at_sigterm():
    command = [sys.executable, "-m", "gripvlm", "serve", "--pruners", "grip", "--keep", "10%", "--port", "0"]
    environment = {**os.environ, "GRIPVLM_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line)))
        assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx2.post(url + CHAT, json=asked(questions()[0])).status_code == 401
        answer = httpx2.post(
            url + CHAT, json=asked(questions()[0]), headers={"Authorization": "Bearer secret"}, timeout=60
        )
        assert answer.json()["usage"]["visual_tokens_kept"] == 26
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.usefixtures("endless")
def test_two_interrupts_end_it_at_once_and_without_a_traceback(caplog, monkeypatch):
    """Ctrl-C waits for what runs, a second one does not; a client that is cut off so is told."""
    # Servers of other tests in this process have set uvicorn's loggers up.
    for name in ("uvicorn", "uvicorn.error"):
        caplog.set_level("INFO", name)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    found: list[httpx2.Response] = []
    app = create_app(*lab_model(), settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    running = threading.Thread(target=server.run)
    running.start()
    waits_until(lambda: server.started)
    port, worker = server.servers[0].sockets[0].getsockname()[1], app.state.server.worker
    row = asked(questions()[0], max_tokens=200)
    post = threading.Thread(target=lambda: found.append(httpx2.post(f"http://127.0.0.1:{port}{CHAT}", json=row)))
    post.start()
    waits_until(lambda: worker.running == 1)
    for _ in range(2):
        server.handle_exit(signal.SIGINT, None)
    running.join(20)
    post.join(20)
    worker.close()
    assert found[0].status_code == 503
    assert "the server is stopping" in found[0].text
    assert [line for line in caplog.records if "Shutting down" in line.message]
    assert not [line for line in caplog.records if line.exc_info or "Traceback" in line.message]
