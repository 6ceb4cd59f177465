"""Which files run on the oldest and the newest transformers too."""

from __future__ import annotations

import pytest

from touching import HERE, touches


@pytest.mark.parametrize(
    "name", ["models/test_families", "engine/test_proportional", "pruners/test_matrix", "eval/test_kill"]
)
def test_files_that_run_models_are_marked(name):
    """Also those that reach transformers through a module beside them, as test_kill does."""
    assert touches(HERE / f"{name}.py")


@pytest.mark.parametrize("name", ["grip/test_policy", "eval/test_stats", "pruners/test_pairwise", "test_budget"])
def test_files_that_run_none_are_not(name):
    assert (HERE / f"{name}.py").is_file()
    assert not touches(HERE / f"{name}.py")
