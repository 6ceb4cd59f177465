"""Finding a pruner by name."""

from __future__ import annotations

import pytest

from gripvlm.errors import PrunerError
from gripvlm.pruners import get_pruner, registry


def test_a_built_in_name_is_found_without_looking_through_all_that_is_installed(monkeypatch):
    """That takes milliseconds, which every `prune_inputs` with a name would pay."""
    looked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: looked.append(group) or [])
    assert get_pruner("mmr(norm):balance=0.3").balance == 0.3
    assert not looked
    with pytest.raises(PrunerError, match="unknown pruner 'nrm': did you mean 'norm'"):
        get_pruner("nrm")
    assert looked
