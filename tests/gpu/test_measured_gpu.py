"""What docs and README say of a GPU is what the files in results/ hold."""

from __future__ import annotations

import json

import pytest

from places import ROOT

FILES = sorted((ROOT / "results").glob("gpu-*.json"))


@pytest.fixture
def tables(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import gpu_tables

    return gpu_tables


def test_docs_are_made_of_the_files(tables):
    section, sentence = "\n".join(tables.on_a_gpu()).strip(), "\n".join(tables.paragraph()).strip()
    assert section.count("| grip, ") == 20  # budgets at every batch that was measured
    assert section in (ROOT / "docs" / "speed.md").read_text()
    assert len(sentence) > 200
    assert sentence in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_where_it_is_from(file):
    found = json.loads(file.read_text())
    assert file.stat().st_size < 400_000
    assert found["environment"]["hardware"]["device"] == "NVIDIA H200"
    assert found["environment"]["git"]["commit"]
    if "bench" in file.name:
        assert found["model"]["weights"] == "random"
