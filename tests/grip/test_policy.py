"""Policies over k-subsets against enumeration, against slow references, and at their edges.

`ConditionalBernoulli`, of the study beside the package, has the same properties and is tested with it.
"""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gripvlm.errors import InputError
from gripvlm.grip.policy import PlackettLuce, samples_to_mask
from places import ROOT

sys.path.insert(0, str(ROOT))
from experiments.grip_ablation.relaxations import conditional_bernoulli
from experiments.grip_ablation.relaxations.conditional_bernoulli import ConditionalBernoulli

BOTH = pytest.mark.parametrize("policy_of", [PlackettLuce, ConditionalBernoulli])
LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.7, -0.4], [1.5, 1.5, -3.0, 4.0, 0.1, 0.2]], dtype=torch.float64)
OTHERS = torch.tensor([[0.0, 1.0, 0.5, -2.0, 0.3, 0.3], [-1.0, 2.0, 0.0, 1.0, 0.0, 3.0]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_sample(policy_of: type, n: int, k: int, rows: int) -> torch.Tensor:
    """All that a policy can give, [B, all, K]: ordered tuples or sets."""
    tuples = itertools.permutations if policy_of is PlackettLuce else itertools.combinations
    return torch.tensor(list(tuples(range(n), k)))[None].expand(rows, -1, -1)


def slow_log_prob(policy_of: type, logits: list[float], samples: list[int]) -> float:
    """By the definition, one softmax after another or one sum over all sets."""
    if policy_of is PlackettLuce:
        left, total = set(range(len(logits))), 0.0
        for pick in samples:
            total += logits[pick] - math.log(sum(math.exp(logits[i]) for i in left))
            left.remove(pick)
        return total
    sets = itertools.combinations(range(len(logits)), len(samples))
    return sum(logits[i] for i in samples) - math.log(sum(math.exp(sum(logits[i] for i in s)) for s in sets))


def chi_square(samples: torch.Tensor, every: torch.Tensor, chances: torch.Tensor) -> float:
    """How many standard deviations the frequencies of samples [G, K] lie from `chances` of every [all, K]."""
    counts = (samples[:, None] == every[None]).all(-1).sum(0)
    assert int(counts.sum()) == len(samples), "a sample is not in the list of all"
    expected = chances * len(samples)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(every) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def slow_log_sizes(logits: torch.Tensor, k: int) -> torch.Tensor:
    """log e_0 .. log e_k of exp(logits [n]) in float64: the recursion over items, in log space."""
    table = torch.full((k + 1,), -torch.inf, dtype=torch.float64)
    table[0] = 0.0
    for logit in logits.double():
        table[1:] = torch.logaddexp(table[1:], table[:-1] + logit)
    return table


@BOTH
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_log_prob_is_the_definition_and_sums_to_one(policy_of, k):
    every = every_sample(policy_of, 6, k, 2)
    log_prob = policy_of(LOGITS, k).log_prob(every)
    assert torch.allclose(log_prob.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    for row, index in [(0, 0), (1, 0), (0, every.shape[1] // 2), (1, every.shape[1] - 1)]:
        slow = slow_log_prob(policy_of, LOGITS[row].tolist(), every[row, index].tolist())
        assert float(log_prob[row, index]) == pytest.approx(slow, abs=1e-12)


def test_one_pick_is_the_softmax_all_picks_are_certain_and_between_the_families_differ():
    one = torch.arange(6)[None, :, None].expand(2, -1, -1)
    for policy_of in (PlackettLuce, ConditionalBernoulli):
        assert torch.allclose(policy_of(LOGITS, 1).log_prob(one), LOGITS.log_softmax(-1), atol=1e-12)
    certain = ConditionalBernoulli(LOGITS, 6)
    assert torch.allclose(certain.log_prob(certain.mode()[:, None]), torch.zeros(2, 1, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(certain.inclusion(), torch.ones(2, 6, dtype=torch.float64), atol=1e-12)
    orders = torch.tensor([[[0, 2], [2, 0]]] * 2)
    ordered = PlackettLuce(LOGITS, 2).log_prob(orders).logsumexp(-1)
    assert ((ordered - ConditionalBernoulli(LOGITS, 2).log_prob(orders)[:, 0]).abs() > 0.01).all()


def test_the_first_picks_of_plackett_luce_have_the_policy_of_a_smaller_k():
    every = every_sample(PlackettLuce, 6, 3, 1)
    chances = PlackettLuce(LOGITS[:1], 3).log_prob(every).exp()[0]
    starts = (every[0, :, :2] == torch.tensor([4, 1])).all(-1)
    shorter = PlackettLuce(LOGITS[:1], 2).log_prob(torch.tensor([[[4, 1]]])).exp()
    assert float(chances[starts].sum()) == pytest.approx(float(shorter), abs=1e-12)


def test_steps_add_up_to_the_log_prob():
    policy = PlackettLuce(LOGITS, torch.tensor([2, 4]))
    samples = policy.sample(5, generator=generator())
    steps = policy.step_log_probs(samples)
    assert torch.allclose(steps.sum(-1), policy.log_prob(samples))
    assert (steps[0, :, 2:] == 0).all()
    assert (steps[1] < 0).all()
    first = LOGITS[:, None].expand(-1, 5, -1).log_softmax(-1).gather(-1, samples[..., :1])
    assert torch.allclose(steps[..., :1], first)


@BOTH
def test_samples_have_the_frequencies_of_the_policy(policy_of):
    every = every_sample(policy_of, 5, 3, 1)
    policy = policy_of(LOGITS[:1, :5].float(), 3)
    chances = policy.log_prob(every).exp()[0]
    samples = policy.sample(20000, generator=generator(3))[0]
    assert abs(chi_square(samples, every[0], chances)) < 4
    wrong = policy_of(LOGITS[:1, :5].float() * 0.9, 3).log_prob(every).exp()[0]
    assert chi_square(samples, every[0], wrong) > 4, "the test has no power"


@BOTH
def test_ragged_rows_have_the_frequencies_of_their_own_law(policy_of):
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    logits = LOGITS.masked_fill(torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool(), -torch.inf)
    policy = policy_of(logits, torch.tensor([2, 3]), mask)
    samples = policy.sample(10000, generator=generator(1))
    for row, (items, k) in enumerate([([0, 1, 3, 4], 2), ([0, 2, 3, 4, 5], 3)]):
        alone = policy_of(logits[row : row + 1, items], k)
        every = every_sample(policy_of, len(items), k, 1)
        named = torch.tensor(items)[every]
        assert (samples[row, :, k:] == -1).all()
        assert abs(chi_square(samples[row, :, :k], named[0], alone.log_prob(every).exp()[0])) < 4
        filled = torch.nn.functional.pad(named, (0, 3 - k), value=-1)
        both = torch.cat([filled, samples[1 - row, :1].expand(1, filled.shape[1], -1)])
        both = both if row == 0 else both.flip(0)
        assert torch.allclose(policy.log_prob(both)[row], alone.log_prob(every)[0], atol=1e-12)


@BOTH
def test_a_generator_repeats(policy_of):
    policy = policy_of(torch.zeros(3, 8), 4)
    first = policy.sample(6, generator=generator(5))
    assert torch.equal(first, policy.sample(6, generator=generator(5)))
    assert not torch.equal(first, policy.sample(6, generator=generator(6)))


def test_the_mode_is_the_top_k_with_ties_by_lower_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    k = torch.tensor([3, 2])
    assert PlackettLuce(logits, k).mode().tolist() == [[1, 2, 4], [0, 1, -1]]
    assert ConditionalBernoulli(logits.flip(-1), k).mode().tolist() == [[0, 2, 3], [0, 1, -1]]
    for policy_of in (PlackettLuce, ConditionalBernoulli):
        policy = policy_of(LOGITS, 3)
        every = every_sample(policy_of, 6, 3, 2)
        assert torch.allclose(policy.log_prob(policy.mode()[:, None])[:, 0], policy.log_prob(every).max(-1).values)


def test_sets_normalizer_inclusion_entropy_and_kl_are_those_of_the_enumeration():
    every = every_sample(ConditionalBernoulli, 6, 3, 2)
    policy, other = ConditionalBernoulli(LOGITS, 3), ConditionalBernoulli(OTHERS, 3)
    log_prob, member = policy.log_prob(every), samples_to_mask(every, 6)
    score = (LOGITS[:, None] * member).sum(-1)
    assert torch.allclose(policy.log_normalizer(), score.logsumexp(-1), atol=1e-12)
    assert torch.allclose(policy.inclusion(), (log_prob.exp()[..., None] * member).sum(1), atol=1e-12)
    assert torch.allclose(policy.inclusion().sum(-1), torch.full((2,), 3.0, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(policy.entropy(), -(log_prob.exp() * log_prob).sum(-1), atol=1e-12)
    assert torch.allclose(policy.kl(other), (log_prob.exp() * (log_prob - other.log_prob(every))).sum(-1), atol=1e-12)
    assert torch.allclose(policy.kl(policy), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    live = LOGITS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ConditionalBernoulli(live, 3).log_normalizer().sum(), live)
    assert torch.allclose(slope, policy.inclusion(), atol=1e-12)
    assert float(ConditionalBernoulli(torch.zeros(1, 9), 4).entropy()) == pytest.approx(math.log(math.comb(9, 4)))


def test_rare_items_keep_their_relative_inclusion():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0, -60.0, 70.0], dtype=torch.float64)
    every = every_sample(ConditionalBernoulli, 6, 3, 1)[0]
    score, member = logits[every].sum(-1), samples_to_mask(every, 6)
    slow = score[member[:, 4]].logsumexp(-1) - score.logsumexp(-1)
    assert float(ConditionalBernoulli(logits[None], 3).inclusion()[0, 4].log()) == pytest.approx(float(slow), abs=1e-9)


@pytest.mark.parametrize("k", [1, 30, 2048, 4000, 4096])
def test_equal_logits_give_every_set_of_many_items_the_same_chance(k):
    policy = ConditionalBernoulli(torch.full((1, 4096), 7.0, dtype=torch.float64), k)
    sets = math.lgamma(4097) - math.lgamma(k + 1) - math.lgamma(4097 - k)
    assert float(policy.entropy()) == pytest.approx(sets, abs=1e-8)
    assert float(policy.log_normalizer()) == pytest.approx(sets + 7 * k, abs=1e-8)
    assert torch.allclose(policy.inclusion(), torch.full((1, 4096), k / 4096, dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("edge", [2.0**-53, 1 - 2.0**-53])
def test_the_last_bit_of_the_noise_still_gives_sets_of_k_real_items(edge, monkeypatch):
    def noise(logits, samples, width, generator):
        return torch.full((logits.shape[0], samples, width), edge, dtype=torch.float64)

    monkeypatch.setattr(conditional_bernoulli, "uniform_noise", noise)
    logits = torch.randn(40, 37, generator=generator()) * 3
    mask = torch.rand(40, 37, generator=generator()) < 0.7
    samples = ConditionalBernoulli(logits, 9, mask).sample(1)
    assert (samples_to_mask(samples, 37)[:, 0] & mask).sum(-1).tolist() == [9] * 40


def test_step_entropy_and_step_kl_are_those_of_the_softmax_over_what_is_left():
    policy, other = PlackettLuce(LOGITS, 6), PlackettLuce(OTHERS, 6)
    samples = policy.sample(4, generator=generator())
    entropy, divergence = policy.step_entropy(samples), policy.step_kl(other, samples)
    for row, sample, step in itertools.product(range(2), range(4), range(6)):
        left = samples[row, sample, step:]
        mine, theirs = LOGITS[row, left].log_softmax(-1), OTHERS[row, left].log_softmax(-1)
        assert float(entropy[row, sample, step]) == pytest.approx(float(-(mine.exp() * mine).sum()), abs=1e-12)
        expected = float((mine.exp() * (mine - theirs)).sum())
        assert float(divergence[row, sample, step]) == pytest.approx(expected, abs=1e-12)
    assert float(policy.step_kl(policy, samples).abs().max()) < 1e-12


def test_estimates_of_the_ordered_law_are_unbiased():
    policy, other = PlackettLuce(LOGITS, torch.tensor([3, 3])), PlackettLuce(OTHERS, 3)
    every = every_sample(PlackettLuce, 6, 3, 2)
    log_prob = policy.log_prob(every)
    exact = -(log_prob.exp() * log_prob).sum(-1)
    assert torch.allclose((log_prob.exp() * policy.entropy(every)).sum(-1), exact, atol=1e-12)
    exact = (log_prob.exp() * (log_prob - other.log_prob(every))).sum(-1)
    assert torch.allclose((log_prob.exp() * policy.kl(other, every)).sum(-1), exact, atol=1e-12)
    spread = (log_prob.exp() * (log_prob + (log_prob.exp() * -log_prob).sum(-1, keepdim=True)) ** 2).sum(-1)
    estimate = policy.entropy(every)
    mean = (log_prob.exp() * estimate).sum(-1, keepdim=True)
    assert ((log_prob.exp() * (estimate - mean) ** 2).sum(-1) < 0.5 * spread).all(), "no better than -log_prob"


@BOTH
def test_the_score_has_mean_zero(policy_of):
    live = LOGITS.clone().requires_grad_()
    policy = policy_of(live, 3)
    log_prob = policy.log_prob(every_sample(policy_of, 6, 3, 2))
    (mean,) = torch.autograd.grad((log_prob.detach().exp() * log_prob).sum(), live, retain_graph=True)
    assert float(mean.abs().max()) < 1e-12
    (single,) = torch.autograd.grad(log_prob[:, 0].sum(), live)
    assert float(single.abs().max()) > 0.1


def ragged(policy_of: type, logits: torch.Tensor):
    return policy_of(logits, torch.tensor([2, 4]), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool())


@BOTH
def test_gradients_are_those_of_finite_differences(policy_of):
    samples = ragged(policy_of, LOGITS).sample(3, generator=generator())
    one, two = LOGITS.clone().requires_grad_(), OTHERS.clone().requires_grad_()
    assert gradcheck(lambda s: ragged(policy_of, s).log_prob(samples), one)
    if policy_of is PlackettLuce:
        assert gradcheck(lambda s: ragged(policy_of, s).step_log_probs(samples), one)
        assert gradcheck(lambda s: ragged(policy_of, s).step_entropy(samples), one)
        assert gradcheck(lambda s, r: ragged(policy_of, s).step_kl(ragged(policy_of, r), samples), (one, two))
    else:
        assert gradcheck(lambda s: ragged(policy_of, s).inclusion(), one)
        assert gradcheck(lambda s: ragged(policy_of, s).entropy(), one)
        assert gradcheck(lambda s, r: ragged(policy_of, s).kl(ragged(policy_of, r)), (one, two))
        assert gradgradcheck(lambda s: ragged(policy_of, s).log_normalizer(), one)


@st.composite
def edges(draw):
    """Logits [B, n] with ties, -inf and spreads of 1e4, a mask, and a k for each row, up to all that is there."""
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    value = st.one_of(
        st.sampled_from([0.0, 0.0, 1.0, -torch.inf, 1e4, -1e4, 1e4 + 1, 300.0, -80.0, 1e19, -1e19]), st.floats(-5, 5)
    )
    logits = torch.tensor(draw(st.lists(st.lists(value, min_size=n, max_size=n), min_size=rows, max_size=rows)))
    mask = torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=rows, max_size=rows))
    ).bool()
    for row in range(rows):
        item = draw(st.integers(0, n - 1))
        mask[row, item] = True
        logits[row, item] = max(float(logits[row, item]), 0.0)
    has = (mask & (logits > -torch.inf)).sum(-1)
    k = torch.tensor([draw(st.sampled_from(sorted({1, int(m), draw(st.integers(1, int(m)))}))) for m in has])
    logits = logits.masked_fill(~mask, torch.nan) if draw(st.booleans()) else logits
    return logits.to(draw(st.sampled_from([torch.float32, torch.float64]))), mask, k


@BOTH
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=edges())
def test_at_the_edges_samples_are_valid_and_all_is_finite(policy_of, case):
    logits, mask, k = case
    live = logits.clone().requires_grad_()
    policy = policy_of(live, k, mask)
    samples = policy.sample(4, generator=generator())
    member = samples_to_mask(samples, policy.n)
    assert torch.equal(member.sum(-1), k[:, None].expand(-1, 4))
    assert not (member & ~(mask & (logits > -torch.inf))[:, None]).any()
    assert torch.equal((samples == -1).sum(-1), int(k.max()) - k[:, None].expand(-1, 4))
    calm = policy_of(torch.zeros_like(live), k, mask)
    values = [policy.log_prob(samples), policy.log_prob(policy.mode()[:, None])]
    if policy_of is PlackettLuce:
        values += [policy.step_entropy(samples), policy.step_kl(calm, samples)]
        assert all((value >= 0).all() for value in values[2:])
    else:
        values += [policy.inclusion(), policy.entropy(), policy.kl(calm), policy.log_normalizer()]
        assert torch.allclose(values[2].sum(-1), k.to(logits.dtype), rtol=1e-6)
        assert (values[2] >= -1e-12).all()
        assert (values[2] <= 1 + 1e-6).all()
    assert (values[1] >= values[0].max(-1, keepdim=True).values - 1e-6 * (1 + values[0].abs().max())).all()
    assert (values[0] <= 1e-6).all()
    for value in values:
        assert value.dtype == logits.dtype
        assert value.isfinite().all()
        (slope,) = torch.autograd.grad(value.sum(), live, retain_graph=True)
        assert slope.isfinite().all()
        assert (slope[~mask] == 0).all()


def test_float32_at_4096_items_is_the_slow_reference_in_float64():
    n, k = 4096, 512
    logits = torch.randn(1, n, generator=generator()) * 6
    policy = PlackettLuce(logits, k)
    samples = policy.sample(2, generator=generator(1))
    ordered = logits[0].double()[samples[0, 1]]
    tail = logits[0].double()[~samples_to_mask(samples, n)[0, 1]].logsumexp(-1)
    slow = sum(float(ordered[j] - torch.logaddexp(ordered[j:].logsumexp(-1), tail)) for j in range(k))
    assert policy.log_prob(samples).dtype == torch.float32
    assert float(policy.log_prob(samples)[0, 1]) == pytest.approx(slow, rel=1e-6)
    sets = ConditionalBernoulli(logits, k)
    slow_log_normalizer = float(slow_log_sizes(logits[0], k)[k])
    assert float(sets.log_normalizer()) == pytest.approx(slow_log_normalizer, rel=1e-6)
    chosen = sets.sample(2, generator=generator(1))
    slow = float(logits[0].double()[chosen[0, 0]].sum()) - slow_log_normalizer
    assert float(sets.log_prob(chosen)[0, 0]) == pytest.approx(slow, rel=1e-6)
    inclusion = sets.inclusion()[0].double()
    assert float(inclusion.sum()) == pytest.approx(k, rel=1e-6)
    item = int(logits[0].argsort()[n - k])  # near the boundary, where the inclusion is neither 0 nor 1
    without = slow_log_sizes(torch.cat([logits[0, :item], logits[0, item + 1 :]]), k)[k - 1]
    assert 0.1 < float(inclusion[item]) < 0.9
    assert float(inclusion[item]) == pytest.approx(
        math.exp(float(logits[0, item] + without) - slow_log_normalizer), rel=1e-6
    )


def test_peaked_logits_where_a_remaining_mass_by_subtraction_is_lost():
    """The trap of training: after the dominant samples, 1 - (what was picked) is rounding noise in float32."""
    logits = torch.tensor([[60.0, 40.0, 1.0, 0.0, -1.0]])
    samples = torch.tensor([[[0, 1, 3]]])
    mass = logits[0].softmax(-1)[samples[0, 0]]
    subtracted = (mass / (1 - torch.cat([mass.new_zeros(1), mass[:-1]]).cumsum(0))).log()
    steps = PlackettLuce(logits, 3).step_log_probs(samples)[0, 0]
    expected = float(logits[0, 2:].double().log_softmax(-1)[1])
    assert float(steps[2]) == pytest.approx(expected, rel=1e-6)
    assert float(steps[0]) == pytest.approx(-math.exp(-20), rel=1e-6)  # 1 - p too is kept
    assert not abs(float(subtracted[2]) - expected) < 1, "the trap is gone: this test has no power"


def test_peaked_sets_keep_the_chance_of_what_lies_near_the_boundary():
    logits = torch.tensor([[1e4, 5e3, 1.0, 0.0, -1.0, -1e4]])
    policy = ConditionalBernoulli(logits, 3)
    assert torch.allclose(policy.inclusion()[0, 2:5], torch.tensor([1.0, 0.0, -1.0]).softmax(-1), rtol=1e-6)
    assert float(policy.log_prob(torch.tensor([[[0, 1, 3]]]))) == pytest.approx(-1.4076059644443804, rel=1e-6)
    assert float(policy.log_normalizer()) == pytest.approx(15001.4076, rel=1e-6)


@BOTH
def test_half_precision_and_inference_mode(policy_of):
    half = torch.randn(2, 9, generator=generator()).bfloat16()
    samples = policy_of(half, 4).sample(3, generator=generator())
    assert policy_of(half, 4).log_prob(samples).dtype == torch.float32
    assert torch.equal(policy_of(half, 4).log_prob(samples), policy_of(half.float(), 4).log_prob(samples))
    with torch.inference_mode():
        policy = policy_of(half.float(), 4)
        values = policy.entropy(samples) if policy_of is PlackettLuce else policy.inclusion()
    normal = policy_of(half.float(), 4)
    assert torch.allclose(values, normal.entropy(samples) if policy_of is PlackettLuce else normal.inclusion())


# --- refusals -----------------------------------------------------------------------------------------------------

REFUSED = [
    (lambda: PlackettLuce(torch.tensor([[1.0, torch.nan]]), 1), "finite up to 1e20"),
    (lambda: ConditionalBernoulli(torch.tensor([[torch.inf, 1.0]]), 1), "finite up to 1e20"),
    (lambda: PlackettLuce(torch.tensor([[1e21, 1.0]]), 1), "finite up to 1e20"),
    (lambda: PlackettLuce(torch.ones(2, 3), 4), r"k=\[4, 4\], and the rows have \[3, 3\] items"),
    (lambda: PlackettLuce(torch.tensor([[-torch.inf, 1.0]]), 2), r"k=\[2\], and the rows have \[1\]"),
    (lambda: PlackettLuce(torch.ones(2, 3), 2, torch.tensor([[1, 1, 1], [0, 1, 0]]).bool()), r"have \[3, 1\]"),
    (lambda: PlackettLuce(torch.ones(1, 3), -1), r"k=\[-1\].*pass k from 0"),
    (lambda: ConditionalBernoulli(torch.ones(1, 3), 0), r"k=\[0\].*pass k from 1"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_what_is_refused_and_what_the_error_says(call, says):
    with pytest.raises(InputError, match=says):
        call()
