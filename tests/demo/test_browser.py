"""The page of `gripvlm demo` and the gallery in a real browser, on a desk's screen and on a phone's.

    make test-demo                                       both; in an environment with Gradio
    pytest -m browser tests/demo/test_browser.py         the gallery alone; needs chromium or google-chrome

SHOTS=folder keeps the pictures, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from devtools import Browser
from places import ROOT

GALLERY = ROOT / "docs/gallery/index.html"
WIDTHS = {"desk": 1280, "phone": 390}
TOO_WIDE = (
    "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
)


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return Path(os.environ.get("SHOTS") or tmp_path_factory.mktemp("shots"))


def cards(browser: Browser, section: int = 0) -> list[str]:
    return browser.js(
        f"[...document.querySelectorAll('section')[{section}].querySelectorAll('.card')].map(c => c.innerText)"
    )


@pytest.mark.browser
@pytest.mark.parametrize("name", WIDTHS)
def test_the_gallery_from_a_file(shots, name):
    with Browser(WIDTHS[name]) as browser:
        browser.open(GALLERY.as_uri())
        browser.wait("document.querySelectorAll('.card svg').length")
        assert browser.js(TOO_WIDE) == 0
        assert browser.js("document.documentElement.scrollWidth") <= WIDTHS[name]
        before = cards(browser)
        assert "wrong" in before[1], "failures first"
        assert browser.js("document.getElementById('budget').innerText") == "10%"
        browser.picture(shots / f"gallery-{name}.png", whole=True)

        browser.click("section .card:nth-child(2) svg", 0.4, 0.6)
        text = browser.js("document.querySelector('.why').innerText")
        assert re.search(r"(kept|dropped) this token\. Score \S+, rank \d+ of 256\. .* has probability .*it \d", text)
        assert browser.js(
            "document.querySelectorAll('section .card')[1].querySelector('rect').getAttribute('visibility')"
        ) == ("visible")

        browser.js("document.getElementById('keep').focus()")
        browser.key("ArrowRight", 2)
        assert browser.js("document.getElementById('budget').innerText") == "50%"
        after = cards(browser)
        assert "128 of 256 tokens" in after[1]
        assert after[0] == before[0], "all tokens are all tokens at every budget"
        assert "was asked at 10% only" in browser.js("document.querySelector('.why').innerText")

        browser.key("ArrowLeft", 2)
        for view in ("scores", "worth"):
            browser.js(f"view.value = '{view}'; view.dispatchEvent(new Event('change'))")
            browser.js("window.scrollTo(0, document.querySelector('section').offsetTop - 60)")
            browser.picture(shots / f"gallery-{name}-{view}.png")
        assert browser.complaints == []


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A running `gripvlm demo`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    command = [sys.executable, "-m", "gripvlm", "demo", "--port", str(port), "--max-new-tokens", "8"]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=log.parent) as server:
        ends = time.monotonic() + 300
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


LOADED = (
    "(i => i.length >= 5 && i.every(e => e.complete && e.naturalWidth))([...document.querySelectorAll('.card img')])"
)


def answered(count: int) -> str:
    return f"[...document.querySelectorAll('.card .answer')].filter(e => e.offsetParent).length === {count}"


def words(browser: Browser) -> str:
    return browser.js("document.body.innerText")


@pytest.mark.demo
@pytest.mark.parametrize("name", WIDTHS)
def test_the_page(address, shots, name, tmp_path):
    with Browser(WIDTHS[name], 1000) as browser:
        browser.open(address)
        # the first example is asked at once
        browser.wait(answered(5))
        browser.wait(LOADED)
        assert "26 of 256 visual tokens" in words(browser)
        assert browser.js("document.documentElement.scrollWidth") <= WIDTHS[name]
        time.sleep(1)  # what has come moves what is below it
        browser.picture(shots / f"page-{name}.png", whole=True)

        # a patch of the second card, grip's
        browser.click(".card:nth-child(2) img", 0.53, 0.53)
        text = browser.wait(
            "(t => t.includes('token') && t.includes('probability') && t)(document.querySelector('#why').innerText)"
        )
        assert re.match(r"grip (kept|dropped) token 137 of 256\. Score \S+, rank \d+\. .* it \d+\.\d %", text.strip())
        browser.picture(shots / f"page-{name}-why.png")

        # the slider
        browser.js("document.querySelector('#keep input[type=range]').focus()")
        browser.key("Home")
        browser.key("ArrowRight", 24)
        browser.wait("document.body.innerText.includes('64 of 256 visual tokens')")

        # a file that is no picture, though its name says so
        wrong = tmp_path / "cat.png"
        wrong.write_text("not a picture")
        before = browser.js("document.querySelector('.card img').src")
        browser.upload("input[type=file]", wrong)
        said = "'cat.png' is not a picture that Pillow can read: cannot identify image file. A PNG, JPEG or WebP"
        browser.wait(f"document.body.innerText.includes({json.dumps(said)})")
        time.sleep(1)
        browser.picture(shots / f"page-{name}-refused.png")
        assert "64 of 256 visual tokens" in words(browser), "what was there stays"
        assert browser.js("document.querySelector('.card img').src") == before

        # a picture of the visitor's own, of another shape
        own = Image.new("RGB", (300, 200), (250, 250, 250))
        ImageDraw.Draw(own).ellipse((20, 20, 140, 140), fill=(200, 30, 30))
        own.save(tmp_path / "own.png")
        browser.upload("input[type=file]", tmp_path / "own.png")
        browser.wait(f"document.querySelector('.card img').src !== '{before}'")
        browser.wait(LOADED)
        browser.picture(shots / f"page-{name}-own.png", whole=True)

        # one method less
        browser.click("input[name=random]")
        browser.wait(answered(4))
        hosts = browser.js("[...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).host))]")
        assert hosts == [address.split("/")[2]], "pages of others' must work without a network"
        assert browser.complaints == []


@pytest.mark.demo
def test_no_function_can_be_called_by_name(address):
    with urllib.request.urlopen(f"{address}gradio_api/info") as info:
        assert json.load(info) == {"named_endpoints": {}, "unnamed_endpoints": {}}
