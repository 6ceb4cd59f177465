"""What pages name is there: links, files, and the options of commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from gripvlm.cli import app
from places import ROOT

PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "experiments/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "log.md"  # dated notes name what was there then
]
FILES = [
    str(path.relative_to(ROOT))
    for room in ("src", "tests", "docs", "examples", "experiments")
    for path in (ROOT / room).rglob("*")
]
USERS = {
    "config.json",
    "questions.jsonl",
    "lab.json",
    "r.json",
    "page/report.md",
    "evaluate.py",
    "example.py",
    "calculation.py",
    "eval_science_qa.py",
    "scorer.json",
    "runs/questions/made.json",
    "runs/llava-1.5-7b/benchmarks.json",
}
"""Files of users, of a run's folder, or of another project."""


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_in_backticks_are_there(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)  # its tables have former names
    for name in set(re.findall(r"`([\w./-]+\.(?:py|md|sh|toml|json|jinja|css))`", text)) - USERS:
        there = (ROOT / name).exists() or any(file.endswith(f"/{name}") for file in FILES)
        assert there, f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_these_options(page):
    commands = get_command(app).commands
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
    typed = re.findall(r"^ *(?:\w+=\S+ )*gripvlm ([a-z].*)$", blocks, re.MULTILINE) + re.findall(
        r"`gripvlm ([^`]+)`", text
    )
    for line in typed:
        words = line.partition(" #")[0].split()
        if words[0] not in commands:
            assert words[0].startswith("-") or page.name == "CHANGELOG.md", f"{page.name}: no command {words[0]}"
            continue
        known = {flag for option in commands[words[0]].params for flag in (*option.opts, *option.secondary_opts)}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= known | {"--help", "--debug"}, f"{page.name}: gripvlm {' '.join(words)}"
