"""What a release says of itself; what is in its files, `make dist` checks."""

from __future__ import annotations

import re

import gripvlm
from places import ROOT


def test_one_version_everywhere():
    versions = {
        "pyproject.toml": re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1],
        "CITATION.cff": re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1],
    }
    assert versions == dict.fromkeys(versions, gripvlm.__version__)


def test_the_changelog_keeps_to_the_usual_headings():
    """keepachangelog.com: versions with dates, newest first; what is not released yet on top."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = {head.partition(":")[0] for head in re.findall(r"^### (.+)$", text, re.MULTILINE)}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_readme_can_be_read_in_a_minute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert "Tried on tiny models and labs only" in "\n".join(text.splitlines()[:10])
