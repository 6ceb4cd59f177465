"""experiments/grip_claim/exploring/bands: the law, against enumeration and the authors' numbers, and its training."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from gripvlm.grip.closeness import Closeness
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.rounds import Penalty, Rounds
from places import ROOT
from tiny_train import asked, drawn, tiny_config, tiny_scorer, tiny_vlm

sys.path.insert(0, str(ROOT))
from experiments.grip_claim.exploring.bands import Bands, bands_of, capped
from experiments.grip_claim.exploring.config import ExploringConfig
from experiments.grip_claim.exploring.stage import Exploring
from experiments.training import train_stage

N, K = 9, 2
LOGITS = torch.tensor([[0.3, 2.1, -0.7, 1.4, 0.9, -1.6, 0.0, 2.6, -torch.inf]], dtype=torch.float64)
VALID = torch.arange(N)[None] < 8


def law_of(rounds: int, logits: torch.Tensor = LOGITS) -> PlackettLuce | Rounds:
    if rounds == 1:
        return PlackettLuce(logits, torch.tensor([K]), VALID)
    cells = torch.stack((torch.arange(N) // 3, torch.arange(N) % 3), -1)[None].float()
    close = Closeness(torch.randn(1, N, 5, generator=drawn()), cells, None)
    return Rounds(logits, torch.tensor([K]), VALID, Penalty(rounds, torch.tensor([1.5], dtype=torch.float64), close))


def every_set(bands: Bands) -> torch.Tensor:
    """[1, G, K]: all ordered sets of two items of one band."""
    of = bands.band[0].tolist()
    return torch.tensor([[[i, j] for i, j in itertools.permutations(range(8), K) if of[i] == of[j]]])


def test_items_are_cut_by_rank():
    # 8 items, k = 2: two bands of four. 8 items, k = 1: four of two. 7 of them, k = 1: sizes 3, 2, 2.
    two = bands_of(LOGITS, torch.tensor([2]), VALID)
    assert two.tolist() == [[1, 0, 1, 0, 0, 1, 1, 0, -1]]
    assert bands_of(LOGITS, torch.tensor([1]), VALID).tolist() == [[2, 0, 3, 1, 1, 3, 2, 0, -1]]
    seven = bands_of(LOGITS, torch.tensor([1]), torch.arange(N)[None] < 7)
    assert torch.bincount(seven[seven >= 0]).tolist() == [3, 2, 2]
    assert bands_of(LOGITS, torch.tensor([8]), VALID)[VALID].tolist() == [0] * 8  # all are kept: one band


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        # LivingFutureLab/CaCoVID@384752d, sample_utils.py: clip_max_probability(p, max(min(2 / M, 0.9), 0.1))
        ([0.7, 0.15, 0.1, 0.05], [0.5, 0.2394, 0.1596, 0.101]),
        ([0.6, 0.4], [0.6, 0.4]),
        ([0.55, 0.25, 0.1, 0.06, 0.03, 0.01], [0.3333, 0.3333, 0.1527, 0.0916, 0.0458, 0.0432]),
        ([0.4, 0.35, 0.15, 0.1], [0.4, 0.35, 0.15, 0.1]),
        ([1.0], [1.0]),
        ([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02], [0.25, 0.2143, 0.2143, 0.1071, 0.1071, 0.0536, 0.0321, 0.0214]),
    ],
)
def test_band_probabilities_are_those_of_the_authors_code(shares, expected):
    found = capped(torch.tensor([[*shares, 0.0]], dtype=torch.float64), torch.tensor([len(shares)]))
    assert found[0].tolist() == pytest.approx([*expected, 0.0], abs=2e-3)
    assert float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_law_is_that_of_all_sets_one_by_one(rounds):
    bands = Bands(law_of(rounds), VALID)
    sets = every_set(bands)
    probability = bands.log_prob(sets).exp()[0]
    assert len(probability) == 24
    assert float(probability.sum()) == pytest.approx(1, abs=1e-6)
    for band in (0, 1):
        mine = bands.band[0][sets[0, :, 0]] == band
        assert float(probability[mine].sum()) == pytest.approx(float(bands.log_band[0, band].exp()), abs=1e-6)
        assert 0.1 <= float(bands.log_band[0, band].exp()) <= 0.9
    # Inside its band a set has the law's own probability, given that it is in the band.
    alone = law_of(rounds, LOGITS.masked_fill(bands.band != 0, -torch.inf))
    first = bands.band[0][sets[0, :, 0]] == 0
    torch.testing.assert_close(
        probability[first] / bands.log_band[0, 0].exp(), alone.log_prob(sets[:, first]).exp()[0], check_dtype=False
    )
    samples = bands.sample(40_000, generator=drawn(3))[0]
    for pair, p in zip(sets[0], probability, strict=True):
        seen = float((samples == pair).all(-1).double().mean())
        assert seen == pytest.approx(float(p), abs=5 * (float(p) / 40_000) ** 0.5)
    across = torch.tensor([[[7, 5]]])
    assert float(bands.log_prob(across)) < -1e20


@pytest.mark.parametrize("rounds", [1, 2])
def test_entropy_and_divergence_are_exact_in_the_mean_and_gradients_are_right(rounds):
    leaf = LOGITS[:, :8].clone().requires_grad_()
    logits = torch.cat((leaf, LOGITS[:, 8:]), -1)
    bands = Bands(law_of(rounds, logits), VALID)
    sets = every_set(bands)
    log_p = bands.log_prob(sets)[0]
    p = log_p.exp()
    assert float((p * bands.entropy(sets)[0]).sum().detach()) == pytest.approx(
        float(-(p * log_p).sum().detach()), abs=1e-5
    )
    other = Bands(law_of(rounds, 0.5 * LOGITS), VALID, bands.band)
    log_q = other.log_prob(sets)[0]
    assert float((p * bands.kl(other, sets)[0]).sum().detach()) == pytest.approx(
        float((p * (log_p - log_q)).sum().detach()), abs=1e-5
    )
    weights = torch.randn(len(p), generator=drawn(1), dtype=torch.float64)
    (p * weights).sum().backward()
    for i in range(8):
        ends = []
        for sign in (1, -1):
            moved = LOGITS.clone()
            moved[0, i] += sign * 1e-4
            ends.append((Bands(law_of(rounds, moved), VALID, bands.band).log_prob(sets)[0].exp() * weights).sum())
        assert float(leaf.grad[0, i]) == pytest.approx(float(ends[0] - ends[1]) / 2e-4, abs=2e-4)
    assert leaf.grad.abs().max() > 1e-2


def test_rows_of_unlike_k_and_size_are_as_if_alone():
    logits = torch.randn(2, 12, generator=drawn(2), dtype=torch.float64)
    valid = torch.stack((torch.arange(12) < 12, torch.arange(12) < 7))
    both = Bands(PlackettLuce(logits, torch.tensor([1, 3]), valid), valid)
    samples = both.sample(5, generator=drawn())
    assert (samples[0, :, 1:] == -1).all()
    assert valid[1][samples[1]].all()
    for row, k in ((0, 1), (1, 3)):
        one = Bands(PlackettLuce(logits[row : row + 1], torch.tensor([k]), valid[row : row + 1]), valid[row : row + 1])
        torch.testing.assert_close(one.log_prob(samples[row : row + 1, :, :k])[0], both.log_prob(samples)[row])
        torch.testing.assert_close(one.entropy(samples[row : row + 1, :, :k])[0], both.entropy(samples)[row])


def config_of(**changes) -> ExploringConfig:
    own = {"stage": "exploring", "bands": True, **{name: changes.pop(name) for name in ("greedy",) if name in changes}}
    return ExploringConfig(**tiny_config(**changes).to_dict() | own)


@pytest.mark.parametrize("rounds", [1, 4])
def test_the_loss_holds_the_bands_of_the_draws(engine, batch, rounds):
    told = {"budgets": "choices", "keep_choices": "0.125", "num_iterations": 3, "scale_rewards": "none"}
    stage = Exploring(config_of(**told), tiny_scorer(engine.model, rounds=rounds), engine)
    optimiser = torch.optim.SGD(stage.scorer.parameters(), lr=30.0)
    moved = []
    for loss, stats in stage.losses(batch, 0.0, drawn()):
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        moved.append(stats["kl_old"])
    assert moved[0] == pytest.approx(0, abs=1e-6)
    assert 0 < moved[-1] < 1e6  # the scores have moved, and no set fell between bands
    draws = stage._draw(batch, drawn())
    inside = stage._bands[draws.inputs].gather(1, draws.samples.flatten(1)).view(draws.samples.shape)
    assert (inside == inside[..., :1]).all()
    assert len(inside.unique()) > 1


def test_it_trains_by_name(tmp_path):
    config = config_of(output_dir=str(tmp_path / "run"), max_steps=2, greedy=True, rounds=4, beta=0.1, keep_high=0.15)
    train_stage(config, Exploring, *tiny_vlm(), asked(8))
    assert '"entropy"' in (tmp_path / "run" / "metrics.jsonl").read_text()
