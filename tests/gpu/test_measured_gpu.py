"""Files that were measured on a GPU say where they are from."""

from __future__ import annotations

import json

import pytest

from places import ROOT

FILES = sorted((ROOT / "experiments" / "gpu" / "results").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_where_it_is_from(file):
    found = json.loads(file.read_text())
    assert file.stat().st_size < 400_000
    assert found["environment"]["hardware"]["device"] == "NVIDIA H200"
    assert found["environment"]["git"]["commit"]
    if "bench" in file.name:
        assert found["model"]["weights"] == "random"
