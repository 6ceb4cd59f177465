"""The list of every model type that the installed transformers knows, and that none is forgotten."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gripvlm.models import FAMILIES
from gripvlm.models.compat import NEWEST_TESTED, installed, takes
from gripvlm.models.coverage import known_types, model_types, page
from gripvlm.models.families import MISSING, NOT_TAKEN, REFUSED

TESTED = tuple(map(int, NEWEST_TESTED.split(".")[:2]))
UNABLE = sorted(name for name, why in REFUSED.items() if why == NOT_TAKEN)


@pytest.mark.skipif(installed() > TESTED, reason="types that are newer than any tested transformers are missing")
def test_every_type_is_ours_or_refused_or_said_to_be_missing():
    known = set(known_types())
    forgotten = known - set(FAMILIES) - set(REFUSED) - MISSING
    assert not forgotten, f"put {sorted(forgotten)} into ROWS, REFUSED or MISSING of models/families.py"
    if installed() == TESTED:
        assert known >= set(FAMILIES) | set(REFUSED) | MISSING


def test_no_type_has_two_statuses():
    assert not set(FAMILIES) & set(REFUSED)
    assert not MISSING & (set(FAMILIES) | set(REFUSED))


def test_models_of_more_modalities_are_listed_and_those_that_only_hear_are_not():
    assert set(known_types()) >= {"llava", "phi4_multimodal", "qwen2_5_omni", "qwen2_5_omni_thinker"}
    assert not {"qwen2_audio", "voxtral"} & set(known_types())


@pytest.mark.parametrize("name", UNABLE)
def test_what_is_refused_for_its_arguments_lacks_them(name):
    """Where this fails, transformers has learnt to take encoded images: try a row."""
    if name not in known_types():
        pytest.skip(f"transformers {'.'.join(map(str, installed()))} has no {name}")
    model = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[name]]
    assert "mm_encoder_outputs" not in takes(model.forward)


def test_the_page_has_a_line_for_each_type_with_its_reason():
    lines = [line.split("|")[1:-1] for line in page().splitlines() if line.startswith("| `")]
    cells = {name.strip(" `"): (status.strip(), note.strip()) for name, status, note in lines}
    assert cells == {one.name: (one.status, one.note) for one in model_types()}
    assert list(cells) == known_types()
    for name, (status, note) in cells.items():
        assert status in ("ours", "refused", "missing")
        assert bool(note) == (status != "missing"), name
    assert cells["qwen2_vl"] == ("ours", "images and videos, equals masking, tower, layers")
    assert cells["mllama"] == ("refused", REFUSED["mllama"])


def test_a_row_for_a_later_transformers_is_refused_for_now(monkeypatch):
    monkeypatch.setattr("gripvlm.models.coverage.installed", lambda: (5, 20))
    assert ("smolvlm", "refused", "needs transformers>=5.21") in model_types()
