"""How Grip's scorer is kept and what it computes in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gripvlm.errors import PrunerError
from gripvlm.grip.fingerprint import ScorerError
from gripvlm.grip.pruner import Grip
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.pruners import get_pruner
from gripvlm.types import VisualTokens


def images(dtype: torch.dtype = torch.float32) -> list[VisualTokens]:
    torch.manual_seed(0)
    return [VisualTokens(torch.randn(n, 24).to(dtype), k, (4, n // 4)) for n, k in ((16, 5), (16, 5), (24, 9))]


def untrained(**options: str) -> Grip:
    torch.manual_seed(1)
    return Grip("untrained", Scorer(ScorerConfig(24, width=16, heads=2, question=False)), **options)


def test_it_computes_in_the_features_type_unless_told():
    for pruner, features, expected in [
        (untrained(), torch.float32, torch.float32),
        (untrained(), torch.float16, torch.float32),
        (untrained(), torch.bfloat16, torch.bfloat16),
        (untrained(dtype="float32"), torch.bfloat16, torch.float32),
        (untrained(dtype="bfloat16"), torch.float32, torch.bfloat16),
    ]:
        serving = pruner.scorer_for(torch.zeros(1, dtype=features))
        assert serving.score.weight.dtype == expected
        assert pruner.module.score.weight.dtype == torch.float32  # the scorer itself is not rounded
        assert [one.k for one in pruner.select_batch(images(features))] == [5, 5, 9]


def test_bfloat16_keeps_nearly_the_same_tokens():
    """Of scores that differ by more than their rounding."""
    plain, half = untrained(), untrained(dtype="bfloat16")
    for one, other in zip(plain.select_batch(images()), half.select_batch(images()), strict=True):
        assert (one.scores - other.scores).abs().max() < 0.05 * one.scores.std() + 0.02
        assert len(set(one.indices.tolist()) & set(other.indices.tolist())) >= one.k - 1


def test_other_types_are_refused():
    with pytest.raises(PrunerError, match="dtype='int8': pass dtype=float32, dtype=bfloat16 or dtype=auto"):
        untrained(dtype="int8")
    with pytest.raises(PrunerError, match="dtype='int8'"):
        get_pruner("grip:dtype=int8")


def test_a_folder_is_read_again_only_when_it_was_written_to(tmp_path, monkeypatch):
    read = []
    original = Scorer.from_pretrained.__func__
    monkeypatch.setattr(Scorer, "from_pretrained", classmethod(lambda cls, *a: read.append(a) or original(cls, *a)))
    untrained().module.save_pretrained(tmp_path)
    spec = f"grip:scorer={tmp_path}"
    first, second = get_pruner(spec), get_pruner(spec)
    assert len(read) == 1
    assert first.weights == second.weights
    other = untrained().module
    with torch.no_grad():
        other.score.bias += 1
    other.save_pretrained(tmp_path)
    assert get_pruner(spec).weights != first.weights
    assert len(read) == 2


def test_images_of_one_size_are_scored_as_they_are_alone():
    """Masks that say nothing are left away; the scores stay."""
    pruner, some = untrained(), images()
    for part in (some[:2], some):
        together = pruner.select_batch(part)
        for one, tokens in zip(together, part, strict=True):
            torch.testing.assert_close(one.scores, pruner.score(tokens), atol=1e-5, rtol=1e-4)
            assert one.sound


def test_inference_mode_leaves_nothing_behind():
    with torch.inference_mode():
        pruner = get_pruner("grip:scorer=lab-blind,dtype=bfloat16")
        some = [VisualTokens(torch.randn(16, 160), 5, (4, 4))]
        pruner.select_batch(some)
    assert not pruner.scorer_for(some[0].features).score.weight.is_inference()
    assert pruner.select_batch([VisualTokens(torch.randn(16, 160), 5, (4, 4))])[0].k == 5
    made_inside = untrained()
    with torch.inference_mode():
        made_inside = Grip("untrained", Scorer(made_inside.module.config), dtype="bfloat16")
    assert made_inside.select_batch(images())[0].k == 5


def test_two_forms_are_kept_side_by_side():
    pruner = untrained()
    half, plain = (pruner.scorer_for(torch.zeros(1, dtype=t)) for t in (torch.bfloat16, torch.float32))
    assert pruner.scorer_for(torch.zeros(1, dtype=torch.bfloat16)) is half
    assert pruner.scorer_for(torch.zeros(1)) is plain is pruner.module


def test_wrong_names_and_types_say_what_there_is():
    with pytest.raises(
        ScorerError, match=r"no scorer 'lab-smal': did you mean 'lab-small'\? pass one of lab, lab-blind"
    ):
        get_pruner("grip:scorer=lab-smal")
    assert Grip.from_pretrained("lab", dtype="bfloat16").dtype == "bfloat16"


def test_a_pruner_can_be_copied_and_sent_to_another_process():
    pruner = untrained(dtype="bfloat16")
    expected = [one.indices.tolist() for one in pruner.select_batch(images())]
    for other in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
        assert other.module is not pruner.module
        assert other.weights == pruner.weights
        assert [one.indices.tolist() for one in other.select_batch(images())] == expected
