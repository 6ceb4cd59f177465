"""The server in this process, over the lab: answers, budgets, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from served import CHAT, asked, body, client_of, lab_model, picture, questions, settings

import gripvlm
from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.eval.answering import make_inputs, question_ids
from gripvlm.serve.chat import ChatRequest, Refusal, parse
from gripvlm.serve.controller import Ladder
from gripvlm.tasks import open_image

pytestmark = pytest.mark.anyio

KEEPS = [0.1, "25%", 64, "<=100", 0.5, 1]


def alone(row: dict[str, Any], pruner: str, keep: Any) -> str:
    """What `gripvlm.prune` and `generate` answer."""
    model, processor = lab_model()
    inputs = make_inputs(model, processor, [row["question"]], [open_image(lab.SAMPLE / "images" / row["image"])])
    with gripvlm.prune(model, pruner, keep=keep, question=question_ids(processor, [row["question"]])):
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def said(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def error_of(answer: httpx2.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


@pytest.mark.parametrize("pruner", ["grip", "random:seed=3"])
async def test_requests_with_budgets_of_their_own_get_what_each_alone_gets(pruner):
    rows = questions()[:12]
    keeps = [KEEPS[i % len(KEEPS)] for i in range(len(rows))]
    async with client_of(settings()) as client:
        answers = await asyncio.gather(
            *(client.post(CHAT, json=asked(r, keep=k, pruner=pruner)) for r, k in zip(rows, keeps, strict=True))
        )
        sizes = metric(client, "gripvlm_phase_seconds_count", phase="prefill"), client.server.worker.encodings.misses
    assert sizes == (12, len({row["image"] for row in rows}))
    for row, keep, answer in zip(rows, keeps, answers, strict=True):
        assert said(answer) == alone(row, pruner, keep)
        got, kept = answer.json(), Budget(keep).count(256)
        assert got["gripvlm"] == {"pruner": pruner, "keep": Budget(keep).plain}
        assert got["usage"]["visual_tokens"] == 256
        assert got["usage"]["visual_tokens_kept"] == kept
        text = len(lab_model()[1].tokenizer(f"{row['question']} answer:").input_ids)
        assert abs(got["usage"]["prompt_tokens"] - kept - text) <= 1  # the space after the picture may be a token


def metric(client: Any, name: str, **labels: str) -> float:
    registry = client.server.metrics._registry
    return registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("pruner", ["fastv:layer=1", "full", "divprune"])
async def test_each_pruner_that_is_served_answers_in_one_server(pruner):
    row = questions()[11]
    keep = {"full": None, "fastv:layer=1": 0.75}.get(pruner, 0.25)
    async with client_of(settings()) as client:
        answer = await client.post(CHAT, json=asked(row, pruner=pruner, keep=keep))
    assert said(answer) == alone(row, pruner, keep or 1.0)
    assert answer.json()["usage"]["visual_tokens_kept"] == {"full": 256, "fastv:layer=1": 192, "divprune": 64}[pruner]


async def test_the_budget_of_the_server_serves_who_names_none():
    async with client_of(settings(keep="10%")) as client:
        answer = await client.post(CHAT, json=asked(questions()[0]))
    assert answer.json()["gripvlm"] == {"pruner": "grip", "keep": 0.1}


async def test_streamed_pieces_are_the_answer():
    row = questions()[11]
    request = asked(row, keep=0.5)
    async with client_of(settings()) as client:
        whole = said(await client.post(CHAT, json=request))
        streamed = await client.post(CHAT, json={**request, "stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in streamed.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [part["choices"][0]["delta"].get("content", "") for part in parts if part["choices"]]
    assert "".join(deltas) == whole
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 2) + ["stop"]
    assert parts[-1]["usage"]["visual_tokens_kept"] == 128
    assert len({part["id"] for part in parts}) == 1


async def test_a_conversation_and_a_stop_text():
    row = questions()[8]
    first = asked(row, keep=0.5)
    async with client_of(settings()) as client:
        answer = said(await client.post(CHAT, json=first))
        turns = [*first["messages"], {"role": "assistant", "content": answer}, {"role": "user", "content": "why?"}]
        assert said(await client.post(CHAT, json={**first, "messages": turns}))
        stopped = await client.post(CHAT, json={**first, "stop": answer[1:]})
        assert said(stopped) == answer[:1]
        assert stopped.json()["choices"][0]["finish_reason"] == "stop"
        short = await client.post(CHAT, json={**first, "max_tokens": 1, "messages": turns})
        assert short.json()["usage"]["completion_tokens"] <= 1


HALVES = [{"type": "text", "text": half} for half in ("an <ima", "ge> here")]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep": 0}, "keeps nothing: pass a count"),
        ({"keep": 1.5}, "is a fraction above 1"),
        ({"keep": "most"}, "'most' is no budget: use"),
        ({"keep": 257}, "keep=257, but this prompt with 1 picture has only 256 visual tokens: pass"),
        ({"keep": True}, "keep"),
        ({"keep": [1]}, "keep"),
        ({"pruner": "norm"}, "pruner 'norm' is not served: use one of grip, divprune"),
        ({"pruner": "full", "keep": 0.5}, "cannot be met: leave keep out"),
        ({"max_tokens": 10_000}, "max_tokens is 10000, allowed are 512"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature: Input should be a valid number"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n: Input should be 1"),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "an <image> here"}]}, "placeholder of a picture: leave it out"),
        ({"messages": [{"role": "user", "content": HALVES}]}, "placeholder of a picture: leave it out"),
        ({"messages": [{"role": "user", "content": "? " * 3000}]}, "allowed are 1024 in all: make it shorter"),
        ({"stop": ["x"] * 9}, "stop"),
        ({"pruner": "fastv:layer=1", "keep": 1}, "fastv"),  # its first layer alone pays for more
        ({"messages": [{"role": "user", "content": "x" * 400_000}]}, "letters, more than"),
        ({"messages": [{"role": "user", "content": ""}] * 1_001}, "messages: List should have at most 1000 items"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_a_request_may_not_ask_for(fields, says):
    async with client_of(settings()) as client:
        message = error_of(await client.post(CHAT, json={**asked(questions()[0]), **fields}))
        assert says in message
        assert client.server.worker.encodings.misses == 0
        assert metric(client, "gripvlm_phase_seconds_count", phase="queue") == 0  # the model was not touched
        assert said(await client.post(CHAT, json=asked(questions()[0]))) == alone(questions()[0], "grip", 0.25)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64,AAAA", "picture 0 is not a picture that Pillow can read"),
        ("data:image/png;base64,A*A", "picture 0 is not valid base64"),
        ("data:image/png,AAAA", "without base64: pass data:image/png;base64,..."),
        ("data:", "without base64"),
        ("", "has a URL of the kind ''"),
        ("ftp://x/y.png", "has a URL of the kind 'ftp'"),
        ("http://[x", "has no valid URL"),
        ("https://example.com/a.png", "downloaded from 'example.com', but none is allowed: pass data"),
        ("file:///etc/passwd", "is a file, and this server reads none"),
        (picture(3000, 1000), "picture 0 has 3000 x 1000 pixels, allowed are 2000000 in all: make it smaller"),
    ],
    ids=lambda value: value[:30],
)
async def test_pictures_that_are_refused(url, says):
    async with client_of(settings(limits={"max_megapixels": 2})) as client:
        assert says in error_of(await client.post(CHAT, json=body("what?", url)))
        assert client.server.worker.encodings.misses == 0


async def test_the_smallest_and_the_largest_pictures_and_too_many():
    async with client_of(settings(limits={"max_pictures": 2})) as client:
        for width, height in ((1, 1), (1, 4000), (4000, 4000)):
            assert said(await client.post(CHAT, json=body("is there a bus?", picture(width, height)))) in ("yes", "no")
        small = picture(9, 9)
        two = await client.post(CHAT, json=body("is there a bus?", small, picture(9, 9, "blue"), keep=3))
        assert two.json()["usage"]["visual_tokens_kept"] == 6
        assert "has 3 pictures, allowed are 2" in error_of(await client.post(CHAT, json=body("?", small, small, small)))


async def test_a_picture_of_40_megapixels_is_served_where_it_is_allowed():
    large = picture(8000, 5000)
    async with client_of(settings()) as client:
        message = error_of(await client.post(CHAT, json=body("is there a bus?", large)))
        assert "picture 0 has 8000 x 5000 pixels, allowed are 16000000 in all: make it smaller" in message
    async with client_of(settings(limits={"max_megapixels": 40})) as client:
        assert said(await client.post(CHAT, json=body("is there a bus?", large))) in ("yes", "no")


async def test_files_of_the_folder_that_is_allowed_and_no_others(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside.webp"
    inside.mkdir()
    content = (lab.SAMPLE / "images" / questions()[0]["image"]).read_bytes()
    (inside / "a b.webp").write_bytes(content)
    outside.write_bytes(content)
    (inside / "link.webp").symlink_to(outside)
    async with client_of(settings(folder=inside)) as client:

        async def ask(path: Path | str) -> httpx2.Response:
            return await client.post(CHAT, json=body(questions()[0]["question"], f"file://{path}"))

        assert said(await ask(f"{inside}/a%20b.webp")) == alone(questions()[0], "grip", 0.25)
        for path in (outside, inside / "link.webp", f"{inside}/../outside.webp", inside / "none.webp", inside, "//x/y"):
            assert "is no file that this server may read" in error_of(await ask(path))


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one"}])
async def test_a_key_is_asked_for(header):
    async with client_of(settings(keys=("one", "two"))) as client:
        for path in (CHAT, "/v1/models"):
            answer = await client.request("POST" if path == CHAT else "GET", path, headers=header)
            assert "the API key is missing or wrong" in error_of(answer, 401)
        for key in ("one", "two"):
            right = {"Authorization": f"Bearer {key}"}
            assert said(await client.post(CHAT, json=asked(questions()[0]), headers=right))
        assert (await client.get("/health")).status_code == 200


async def test_more_requests_than_may_be_open_are_told_when_to_come_again():
    async with client_of(settings(limits={"max_batch": 2, "max_queue": 3})) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=asked(row)) for row in questions()[:12]))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 12 - 5
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert "5 requests are open, allowed are 5" in error_of(refused[0], 429)
        for row, answer in zip(questions(), answers, strict=False):
            assert answer.status_code == 429 or said(answer) == alone(row, "grip", 0.25)
        assert client.server.open_requests == 0
        assert said(await client.post(CHAT, json=asked(questions()[0])))
        assert metric(client, "gripvlm_requests_total", status="429") == 7


async def test_no_request_is_served_under_another_s_budget_pruner_or_key():
    draw = random.Random(4)
    keys, budgets = ("one", "two"), [8, 0.1, "25%", "<=100", 0.5]
    async with client_of(settings(keys=keys, limits={"max_queue": 200})) as client:

        async def ask(i: int) -> None:
            row, keep, key = draw.choice(questions()), draw.choice(budgets), draw.choice((*keys, "onetwo", ""))
            pruner = draw.choice(("grip", "divprune", "random:seed=3"))
            request = asked(row, keep=keep, pruner=pruner, max_tokens=1, stream=bool(i % 2))
            answer = await client.post(CHAT, json=request, headers={"Authorization": f"Bearer {key}"})
            if key not in keys:
                error_of(answer, 401)
                return
            if i % 2:
                events = [line for line in answer.text.split("\n\n") if "gripvlm" in line]
                got = json.loads(events[-1].removeprefix("data: "))
            else:
                got = answer.json()
                assert got["usage"]["visual_tokens_kept"] == Budget(keep).count(256)
            assert got["gripvlm"] == {"pruner": pruner, "keep": Budget(keep).plain}

        await asyncio.gather(*(ask(i) for i in range(96)))
        assert client.server.open_requests == 0


async def test_a_worker_that_is_killed_is_seen_from_outside():
    def die(*_: Any) -> None:
        raise SystemExit

    async with client_of(settings()) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        hook = lab_model()[0].register_forward_pre_hook(die)
        try:
            answers = await asyncio.gather(*(client.post(CHAT, json=asked(row)) for row in questions()[:3]))
        finally:
            hook.remove()
        late = await client.post(CHAT, json=asked(questions()[0]))
        for answer in (*answers, late):
            assert "has failed and must be restarted" in error_of(answer, 503)
        health = await client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "failed"})


async def test_bodies_that_are_too_large_and_models_that_are_not_there():
    async with client_of(settings(limits={"max_body_mb": 0.002})) as client:
        assert "more than 2000 bytes" in error_of(await client.post(CHAT, content=b"x" * 2001), 413)

        async def pieces() -> Any:
            for _ in range(30):
                yield b"x" * 100

        assert "more than 2000 bytes" in error_of(await client.post(CHAT, content=pieces()), 413)
        request = {"model": "gpt", "messages": [{"role": "user", "content": "hello"}]}
        assert "no model 'gpt' here: ask for 'lab'" in error_of(await client.post(CHAT, json=request), 404)
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "lab"
        assert (await client.get("/v1/models/lab")).json()["owned_by"] == "gripvlm"
        error_of(await client.get("/v1/models/x"), 404)
        error_of(await client.get("/nowhere"), 404)
        error_of(await client.get(CHAT), 405)


async def test_a_temperature_next_to_zero_is_zero_and_costs_the_batch_nothing():
    rows = questions()[:4]
    async with client_of(settings()) as client:
        cold = (1e-310, 1e-40, 1e-7, 0)
        answers = await asyncio.gather(
            *(client.post(CHAT, json=asked(row, temperature=t, seed=1)) for row, t in zip(rows, cold, strict=True))
        )
    assert [said(answer) for answer in answers] == [alone(row, "grip", 0.25) for row in rows]


async def test_tokens_above_a_budget_are_counted():
    spec = "top_p(grip):p=0.99,most=3"
    async with client_of(settings(pruners=(spec, "grip"))) as client:
        answers = [await client.post(CHAT, json=asked(row, keep=8)) for row in questions()[:6]]
        kept = [answer.json()["usage"]["visual_tokens_kept"] for answer in answers]
        plain = await client.post(CHAT, json=asked(questions()[0], keep=8, pruner="grip"))
        raised = metric(client, "gripvlm_raised_requests_total"), metric(client, "gripvlm_raised_visual_tokens_total")
    assert min(kept) >= 8
    assert max(kept) > 8
    assert raised == (sum(k > 8 for k in kept), sum(kept) - 8 * len(kept))
    assert plain.json()["usage"]["visual_tokens_kept"] == 8


async def test_a_request_keeps_its_id():
    async with client_of(settings()) as client:
        request = {"model": "lab", "messages": [{"role": "user", "content": "is it?"}], "max_tokens": 2}
        mine = await client.post(CHAT, json=request, headers={"X-Request-Id": "mine-1"})
        assert (mine.headers["x-request-id"], mine.json()["id"]) == ("mine-1", "chatcmpl-mine-1")
        other = await client.post(CHAT, json=request, headers={"X-Request-Id": "no good"})
        assert other.headers["x-request-id"] != "no good"


async def test_the_metrics_page():
    async with client_of(settings(ladder=Ladder((Budget("50%"), Budget("10%")), 1e-9))) as client:
        page = ""
        for row in questions()[:8]:
            assert said(await client.post(CHAT, json=asked(row)))
        late = await client.post(CHAT, json=asked(questions()[8]))
        own = await client.post(CHAT, json=asked(questions()[8], keep=0.5))
        page = (await client.get("/metrics")).text
    assert late.json()["gripvlm"]["keep"] == 0.1  # everything was late, so the controller went down
    assert own.json()["gripvlm"]["keep"] == 0.5
    for line in (
        'gripvlm_requests_total{status="200"} 10.0',
        "gripvlm_controller_keep 0.1",
        'gripvlm_controller_steps_total{direction="down"} 1.0',
        "gripvlm_queue_length 0.0",
        'gripvlm_phase_seconds_count{phase="decode"} 10.0',
    ):
        assert line in page
    for name in ("time_to_first_token_seconds", "visual_tokens_total", "completion_tokens_total", "encode_cache_total"):
        assert f"gripvlm_{name}" in page


# --- malformed bodies -------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, "unknown", ""])


def spoiled(changes: dict[str, Any]) -> bytes:
    request = {"model": "lab", "messages": [{"role": "user", "content": "is it?"}], "max_tokens": 1}
    return json.dumps({**request, **changes}).encode()


@given(st.binary(max_size=60) | ANYTHING.map(lambda v: json.dumps(v).encode()))
@hypothesis_settings(max_examples=300, deadline=None)
def test_no_body_is_anything_but_a_request_or_refused(content):
    with pytest.raises(Refusal):
        parse(content)


@given(st.dictionaries(FIELDS, ANYTHING, min_size=1, max_size=2))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_field_breaks_the_parser(changes):
    with contextlib.suppress(Refusal):
        assert isinstance(parse(spoiled(changes)), ChatRequest)


PIECES = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 5000, b'{"model": "lab", "messages": ', b"NaN"]
VALUES = [None, 0, -1, 1e400, "", "\ud800", [], {}, [[]], [None], {"a": 1}, True, "x" * 5000, 10**30]


async def test_three_hundred_malformed_requests_and_then_a_good_one():
    contents = PIECES + [spoiled({name: value}) for name in ChatRequest.model_fields for value in VALUES]
    part = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,"}}]}
    contents += [spoiled({"messages": [{**part, key: value}]}) for key in part for value in VALUES]
    contents += [spoiled({"messages": [{**part, "content": [value]}]}) for value in VALUES]
    assert len(contents) > 300
    async with client_of(settings()) as client:
        answers = [await client.post(CHAT, content=content) for content in contents]
        assert {answer.status_code for answer in answers} <= {200, 400, 404}
        for answer in answers:
            if answer.status_code != 200:
                error_of(answer, answer.status_code)
        assert sum(answer.status_code == 200 for answer in answers) < 60  # null, and what is neutral
        assert client.server.worker.encodings.misses == 0
        assert said(await client.post(CHAT, json=asked(questions()[0]))) == alone(questions()[0], "grip", 0.25)
