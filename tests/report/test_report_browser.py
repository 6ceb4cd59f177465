"""The report in a real browser: nothing runs off a phone's screen, and it prints.

    pytest -m browser tests/report/test_report_browser.py  needs chromium or google-chrome

SHOTS=folder keeps the pictures, to be looked at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gripvlm.report import report
from tiny_results import made_up

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.browser


def chromium(*arguments: str) -> str:
    assert CHROMIUM, "no Chromium on the PATH: apt-get install chromium"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    arms = (
        *((f"a_method_with_a_long_name_{i}:option={i}", 0.5 + 0.02 * i) for i in range(8)),
        ("random", 0.5),
        ("grid", 0.6),
    )
    return report([made_up(folder / "r.json", arms=arms, pictures=20)], folder / "page")


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(("name", "width"), [("phone", 390), ("tablet", 820), ("desk", 1280)])
def test_nothing_but_tables_is_wider_than_the_screen(page, shots, name, width):
    """Asked of the browser itself: a frame as wide as the screen, and how wide what is in it is."""
    probe = page.with_name(f"probe-{name}.html")
    probe.write_text(
        "<body style='margin:0'><iframe id=f src=index.html "
        f"style='border:0;width:{width}px;height:900px'></iframe><script>"
        "onload = () => { const d = document.getElementById('f').contentDocument, e = d.documentElement;"
        "const out = [...d.querySelectorAll('main *')].filter(x => !x.closest('.sheet') && !x.closest('svg')"
        f" && x.getBoundingClientRect().right > {width} + 1).map(x => x.tagName + '.' + x.className);"
        "const cut = x => { const t = x.getBoundingClientRect(), s = x.closest('svg').getBoundingClientRect();"
        " return t.right > s.right + 4 || t.left < s.left - 4; };"
        "out.push(...[...d.querySelectorAll('svg text')].filter(cut).map(x => 'cut ' + x.textContent));"
        "out.push(...[...d.querySelectorAll('th')].filter(x => x.offsetHeight > 90).map(x => 'tall ' + x.innerText));"
        "document.title = 'WIDE ' + e.scrollWidth + ' ' + out.slice(0, 5).join(',') + ' END'; }</script></body>"
    )
    dom = chromium("--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom", probe.as_uri())
    wide = dom.split("<title>WIDE ")[1].split(" END")[0].split(" ", 1)
    assert int(wide[0]) <= width, wide
    assert wide[1].strip() == "", wide
    picture = shots / f"{name}.png"
    chromium(f"--window-size={width},2400", f"--screenshot={picture}", page.as_uri())
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] == width
    assert 0.01 < (pixels < 128).mean() < 0.5, "an empty page, or a black one"


def test_it_prints(page, shots):
    target = shots / "print.pdf"
    chromium("--no-pdf-header-footer", f"--print-to-pdf={target}", page.as_uri())
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 40
