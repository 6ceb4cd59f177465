"""`gripvlm vllm serve` and OpenAI's client, over loopback: minutes, as vLLM starts three processes.

Needs an environment with vLLM: `make test-vllm` builds it and runs this file.
"""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest
from PIL import Image

from gripvlm import lab

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

OPTIONS = ["--pruners", "grip,divprune", "--keep", "25%", "--trust-request-mm-kwargs", "--enable-prompt-tokens-details"]
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4", "--block-size", "32"]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The sampler compiles some functions, for which g++ takes longer than all the rest.
    "TORCHDYNAMO_DISABLE": "1",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "gripvlm", "vllm", "serve", "lab", *OPTIONS, *SMALL]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | QUIET) as server:
        try:
            deadline = time.monotonic() + 900
            while not healthy(port):
                assert server.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0, timeout=300)
        finally:
            server.terminate()
            server.wait(60)


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def request(**options):
    buffer = io.BytesIO()
    Image.open(lab.SAMPLE / "images" / "0000.webp").convert("RGB").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "is there a bus?"}]
    return {
        "model": "lab",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 4,
        "extra_body": {"mm_processor_kwargs": options} if options else {},
    }


def kept(answer) -> int:
    return answer.usage.prompt_tokens_details.multimodal_tokens["image"]


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 64), ({"keep": 8}, 8), ({"keep": "10%", "pruner": "divprune"}, 26), ({"keep": 1.0}, 256)],
)
def test_a_request_chooses_what_it_pays_for(client, options, count):
    answer = client.chat.completions.create(**request(**options))
    assert kept(answer) == count
    if count > 8:
        assert answer.choices[0].message.content.strip() == "yes"


def test_streaming(client):
    parts = client.chat.completions.create(**request(keep=8), stream=True, stream_options={"include_usage": True})
    *_, last = parts
    assert kept(last) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"keep": 300}, "has only 256 visual tokens"),
        ({"pruner": "norm"}, "is not served: use one of grip, divprune"),
        ({"max_pixels": 4}, "mm_processor_kwargs has 'max_pixels'"),
    ],
)
def test_a_wrong_request_is_a_400(client, options, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**request(**options))
    assert kept(client.chat.completions.create(**request())) == 64
