"""Choosing in rounds, against enumeration of all ordered samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from gripvlm.grip.closeness import Closeness
from gripvlm.grip.policy import PlackettLuce, samples_to_mask
from gripvlm.grip.rounds import Penalty, Rounds, adjusted, greedy

N = 5
LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.7], [1.5, 1.5, -3.0, 1.0, 0.1]], dtype=torch.float64)
CLOSE = (torch.linspace(-1.5, 2.0, 2 * N * N, dtype=torch.float64).sin() * 2).abs().reshape(2, N, N)
WEIGHT = torch.tensor([1.3, 0.6], dtype=torch.float64)


class Table(Closeness):
    """Any numbers [B, n, n]."""

    def __init__(self, table):
        super().__init__(table, torch.zeros(*table.shape[:2], 2), None)
        self._table = table


def law(logits, weight, k, rounds, mask=None) -> Rounds:
    return Rounds(logits, k, mask, Penalty(rounds, weight, Table(CLOSE)))


def every(k: int, rows: int = 2) -> torch.Tensor:
    return torch.tensor(list(itertools.permutations(range(N), k)))[None].expand(rows, -1, -1)


def slow(row: int, picks: list[int], rounds: int) -> float:
    """By the definition: one softmax after another, with the logits of the round."""
    k, total = len(picks), 0.0
    ends = [-(-k * r // rounds) for r in range(rounds + 1)]
    for r in range(rounds):
        now = LOGITS[row].clone()
        if ends[r]:
            now -= WEIGHT[row] * CLOSE[row, picks[: ends[r]]].max(0).values
        for step in range(ends[r], ends[r + 1]):
            left = [i for i in range(N) if i not in picks[:step]]
            total += float(now[picks[step]] - now[left].logsumexp(0))
    return total


@pytest.mark.parametrize(("k", "rounds"), [(1, 2), (2, 2), (3, 2), (4, 3), (5, 2), (5, 4), (2, 4)])
def test_log_prob_is_the_definition_and_sums_to_one(k, rounds):
    found = law(LOGITS, WEIGHT, k, rounds).log_prob(every(k))
    assert torch.allclose(found.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    for row in range(2):
        for index in range(0, found.shape[1], 7):
            expected = slow(row, every(k)[row, index].tolist(), rounds)
            assert float(found[row, index]) == pytest.approx(expected, abs=1e-12)


def test_without_a_loss_rounds_are_the_law_of_one():
    k = torch.tensor([2, 5])
    plain, samples = PlackettLuce(LOGITS, k), PlackettLuce(LOGITS, k).sample(6, generator=drawn())
    for rounds in (1, 2, 3, 4):
        same = law(LOGITS, torch.zeros(2), k, rounds)
        assert torch.allclose(same.step_log_probs(samples), plain.step_log_probs(samples), atol=1e-12)
        assert torch.allclose(same.step_entropy(samples), plain.step_entropy(samples), atol=1e-12)
        assert torch.equal(same.mode(), plain.mode())


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_samples_have_the_frequencies_of_the_law():
    policy, outcomes = law(LOGITS, WEIGHT, 3, 2), every(3)
    chances = policy.log_prob(outcomes).exp()
    samples = policy.sample(20000, generator=drawn(1))
    for row in range(2):
        counts = (samples[row, :, None] == outcomes[row][None]).all(-1).sum(0)
        assert int(counts.sum()) == 20000
        expected = chances[row] * 20000
        statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 1].sum())
        freedom = int((expected > 1).sum()) - 1
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("rounds", [2, 3])
def test_entropy_and_kl_are_those_of_the_enumeration_and_so_are_their_gradients(rounds):
    """The mean over all samples, as a function of the logits: what is exact of estimates on given samples."""
    outcomes, leaves = every(3), [t.clone().requires_grad_() for t in (LOGITS, WEIGHT, LOGITS.flip(1), WEIGHT + 0.3)]
    policy, other = law(*leaves[:2], 3, rounds), law(*leaves[2:], 3, rounds)
    log_prob = policy.log_prob(outcomes)
    for estimate, exact in (
        (policy.entropy(outcomes), -log_prob),
        (policy.kl(other, outcomes), log_prob - other.log_prob(outcomes)),
    ):
        mine, true = (log_prob.exp() * estimate).sum(-1), (log_prob.exp() * exact).sum(-1)
        assert torch.allclose(mine, true, atol=1e-12)
        pairs = [
            torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True) for value in (mine, true)
        ]
        for one, two in zip(*pairs, strict=True):
            assert (one is None) == (two is None)
            assert one is None or torch.allclose(one, two, atol=1e-10)


def test_gradients_are_those_of_finite_differences_in_ragged_rows():
    k, mask = torch.tensor([1, 4]), torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    samples = law(LOGITS, WEIGHT, k, 3, mask).sample(4, generator=drawn())
    assert (samples[0, :, 1:] == -1).all()
    assert not (samples[0] == 2).any()
    leaves = LOGITS.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    assert gradcheck(lambda s, w: law(s, w, k, 3, mask).step_log_probs(samples), leaves)
    assert gradcheck(lambda s, w: law(s, w, k, 3, mask).step_entropy(samples), leaves)


def test_the_score_has_mean_zero():
    leaves = LOGITS.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    log_prob = law(*leaves, 4, 2).log_prob(every(4))
    for grad in torch.autograd.grad((log_prob.detach().exp() * log_prob).sum(), leaves):
        assert float(grad.abs().max()) < 1e-12


def test_ragged_rows_are_their_own_law():
    k, mask = torch.tensor([2, 5]), torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    both = law(LOGITS, WEIGHT, k, 4, mask)
    samples = both.sample(5, generator=drawn())
    steps = both.step_log_probs(samples)
    assert (steps[0, :, 2:] == 0).all()
    for row in range(2):
        only = slice(row, row + 1)
        alone = Rounds(LOGITS[only], int(k[row]), mask[only], Penalty(4, WEIGHT[only], Table(CLOSE[only])))
        own = samples[only, :, : k[row]]
        assert torch.allclose(alone.log_prob(own)[0], both.log_prob(samples)[row], atol=1e-12)
        assert alone.mode()[0].tolist() == both.mode()[row, : k[row]].tolist()
        assert (both.mode()[row, k[row] :] == -1).all()


@pytest.mark.parametrize(("k", "rounds"), [(4, 2), (4, 9), (5, 3), (3, 1)])
def test_the_mode_takes_the_highest_of_each_round(k, rounds):
    policy = law(LOGITS, WEIGHT, k, rounds)
    for row in range(2):
        picks: list[int] = []
        for r in range(min(rounds, k)):
            upto = -(-k * (r + 1) // min(rounds, k))
            now = LOGITS[row].clone()
            if picks:
                now -= WEIGHT[row] * CLOSE[row, picks].max(0).values
            now[picks] = -torch.inf
            picks += now.argsort(descending=True)[: upto - len(picks)].tolist()
        assert policy.mode()[row].tolist() == picks


def test_the_highest_adjusted_logits_are_the_mode_and_have_its_gradients():
    drawn_logits = torch.randn(8, 30, dtype=torch.float64, generator=drawn()).requires_grad_()
    close = torch.rand(8, 30, 30, dtype=torch.float64, generator=drawn(1))
    weight = torch.linspace(0.1, 5, 8, dtype=torch.float64).requires_grad_()
    k = torch.tensor([1, 2, 5, 8, 13, 20, 29, 30])
    penalty = Penalty(4, weight, Table(close))
    found = adjusted(drawn_logits, k, 30, penalty)
    kept = samples_to_mask(greedy(drawn_logits.detach(), k, 30, penalty), 30)
    for row in range(8):
        best = found[row].argsort(descending=True)[: int(k[row])]
        assert set(best.tolist()) == set(kept[row].nonzero()[:, 0].tolist())
    assert (found != drawn_logits).any()
    # What is kept does not change in so small a step.
    assert gradcheck(
        lambda s, w: adjusted(s, k, 30, Penalty(4, w, Table(close))), (drawn_logits, weight), eps=1e-8, atol=1e-5
    )


def test_closeness_by_hand():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])[None]
    cells = torch.tensor([[0.5, 0.5], [0.5, 3.5], [1.5, 0.5], [0.5, 0.5]])[None]
    close = Closeness(features, cells, torch.tensor([[0, 0, 0, 1]]))
    found = close.rows(torch.arange(4)[None])[0]
    beside = torch.exp(torch.tensor([-9.0, -1.0, -10.0]) / 4.5) / 2  # 3 columns, 1 row, both apart
    expected = torch.tensor(
        [
            [1.0, 0.5 + beside[0], beside[1], 0.0],  # the last is opposite, and in another image
            [0.5 + beside[0], 1.0, beside[2], 0.0],
            [beside[1], beside[2], 1.0, 0.0],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )
    assert torch.allclose(found, expected, atol=1e-6)
    alone = Closeness(features, cells, None)
    assert torch.equal(alone.rows(torch.tensor([[3, 0]]))[0, :, 0], torch.tensor([0.5, 1.0]))  # opposite, same place
    kept = torch.tensor([[[1, 2], [3, -1], [-1, -1]]])
    near = close.nearest(kept)[0]
    assert torch.equal(near, torch.stack([torch.maximum(found[1], found[2]), found[3], torch.zeros(4)]))
    assert close.nearest(kept[..., :0]).tolist() == [[[0.0] * 4] * 3]
    close.tabulate()
    assert torch.equal(close.nearest(kept)[0], near)


def test_what_was_evaluated_without_gradients_is_evaluated_again():
    logits = LOGITS.clone().requires_grad_()
    policy = law(logits, WEIGHT, 3, 2)
    samples = policy.sample(2, generator=drawn())
    with torch.no_grad():
        assert not policy.log_prob(samples).requires_grad
    assert policy.log_prob(samples).requires_grad
