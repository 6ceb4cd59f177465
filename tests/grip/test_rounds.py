"""Choosing in rounds, against enumeration of all ordered samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from gripvlm.grip.policy import PlackettLuce, samples_to_mask
from gripvlm.grip.rounds import Rounds

N = 5
LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.7], [1.5, 1.5, -3.0, 1.0, 0.1]], dtype=torch.float64)
PAIRS = torch.linspace(-1.5, 2.0, N * N, dtype=torch.float64).reshape(N, N).sin() * 2
OTHER = PAIRS.flip(0) + 0.3


def rescorer(logits: torch.Tensor, pairs: torch.Tensor):
    """Each kept token changes every token's logit, and so does what is left."""

    def rescore(kept, left):
        change = samples_to_mask(kept, N).to(pairs) @ pairs
        return logits[:, None] + change + left[:, None, None] * logits[:, None].cos()

    return rescore


def law(logits, pairs, k, rounds, mask=None) -> Rounds:
    return Rounds(logits, k, mask, rounds, rescorer(logits, pairs))


def every(k: int, rows: int = 2) -> torch.Tensor:
    return torch.tensor(list(itertools.permutations(range(N), k)))[None].expand(rows, -1, -1)


def slow(logits: list[float], pairs: torch.Tensor, picks: list[int], rounds: int) -> float:
    """By the definition: one softmax after another, with the logits of the round."""
    k, total = len(picks), 0.0
    ends = [-(-k * r // rounds) for r in range(rounds + 1)]
    for r in range(rounds):
        now = torch.tensor(logits, dtype=torch.float64)
        if r:
            now = now + pairs[picks[: ends[r]]].sum(0) + (k - ends[r]) * now.cos()
        for step in range(ends[r], ends[r + 1]):
            left = [i for i in range(N) if i not in picks[:step]]
            total += float(now[picks[step]] - now[left].logsumexp(0))
    return total


@pytest.mark.parametrize(("k", "rounds"), [(1, 2), (2, 2), (3, 2), (4, 3), (5, 2), (5, 4), (2, 4)])
def test_log_prob_is_the_definition_and_sums_to_one(k, rounds):
    found = law(LOGITS, PAIRS, k, rounds).log_prob(every(k))
    assert torch.allclose(found.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    for row in range(2):
        for index in range(0, found.shape[1], 7):
            expected = slow(LOGITS[row].tolist(), PAIRS, every(k)[row, index].tolist(), rounds)
            assert float(found[row, index]) == pytest.approx(expected, abs=1e-12)


def test_without_a_change_rounds_are_the_law_of_one():
    k = torch.tensor([2, 5])
    plain, samples = PlackettLuce(LOGITS, k), PlackettLuce(LOGITS, k).sample(6, generator=drawn())
    for rounds in (1, 2, 3, 4):
        same = Rounds(LOGITS, k, None, rounds, lambda kept, left: LOGITS[:, None].expand(-1, kept.shape[1], -1))
        assert torch.allclose(same.step_log_probs(samples), plain.step_log_probs(samples), atol=1e-12)
        assert torch.allclose(same.step_entropy(samples), plain.step_entropy(samples), atol=1e-12)
        assert torch.equal(same.mode(), plain.mode())


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_samples_have_the_frequencies_of_the_law():
    policy, outcomes = law(LOGITS, PAIRS, 3, 2), every(3)
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
    outcomes, leaves = every(3), [t.clone().requires_grad_() for t in (LOGITS, PAIRS, LOGITS.flip(1), OTHER)]
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
    samples = law(LOGITS, PAIRS, k, 3, mask).sample(4, generator=drawn())
    assert (samples[0, :, 1:] == -1).all()
    assert not (samples[0] == 2).any()
    leaves = LOGITS.clone().requires_grad_(), PAIRS.clone().requires_grad_()
    assert gradcheck(lambda s, p: law(s, p, k, 3, mask).step_log_probs(samples), leaves)
    assert gradcheck(lambda s, p: law(s, p, k, 3, mask).step_entropy(samples), leaves)


def test_the_score_has_mean_zero():
    leaves = LOGITS.clone().requires_grad_(), PAIRS.clone().requires_grad_()
    log_prob = law(*leaves, 4, 2).log_prob(every(4))
    for grad in torch.autograd.grad((log_prob.detach().exp() * log_prob).sum(), leaves):
        assert float(grad.abs().max()) < 1e-12


def test_ragged_rows_are_their_own_law():
    k, mask = torch.tensor([2, 5]), torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    both = law(LOGITS, PAIRS, k, 4, mask)
    samples = both.sample(5, generator=drawn())
    steps = both.step_log_probs(samples)
    assert (steps[0, :, 2:] == 0).all()
    for row in range(2):
        alone = Rounds(
            LOGITS[row : row + 1], int(k[row]), mask[row : row + 1], 4, rescorer(LOGITS[row : row + 1], PAIRS)
        )
        mine = samples[row : row + 1, :, : k[row]]
        assert torch.allclose(alone.log_prob(mine)[0], both.log_prob(samples)[row], atol=1e-12)
        assert alone.mode()[0].tolist() == both.mode()[row, : k[row]].tolist()
        assert (both.mode()[row, k[row] :] == -1).all()


def test_the_mode_takes_the_highest_of_each_round():
    policy = law(LOGITS, PAIRS, 4, 2)
    for row in range(2):
        first = LOGITS[row].argsort(descending=True)[:2]
        now = LOGITS[row] + PAIRS[first].sum(0) + 2 * LOGITS[row].cos()
        now[first] = -torch.inf
        assert policy.mode()[row].tolist() == [*first.tolist(), *now.argsort(descending=True)[:2].tolist()]


def test_what_was_evaluated_without_gradients_is_evaluated_again():
    logits = LOGITS.clone().requires_grad_()
    policy = law(logits, PAIRS, 3, 2)
    samples = policy.sample(2, generator=drawn())
    with torch.no_grad():
        assert not policy.log_prob(samples).requires_grad
    assert policy.log_prob(samples).requires_grad
