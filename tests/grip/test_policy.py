"""Laws of k-subsets against enumeration, against slow references, and at their edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gripvlm.grip.policy import ConditionalBernoulli, PlackettLuce, band_mask, picks_to_mask

BOTH = pytest.mark.parametrize("law_of", [PlackettLuce, ConditionalBernoulli])
LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.7, -0.4], [1.5, 1.5, -3.0, 4.0, 0.1, 0.2]], dtype=torch.float64)
OTHERS = torch.tensor([[0.0, 1.0, 0.5, -2.0, 0.3, 0.3], [-1.0, 2.0, 0.0, 1.0, 0.0, 3.0]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_picks(law_of: type, n: int, k: int, rows: int) -> torch.Tensor:
    """All that a law can give, [B, all, K]: ordered tuples or sets."""
    tuples = itertools.permutations if law_of is PlackettLuce else itertools.combinations
    return torch.tensor(list(tuples(range(n), k)))[None].expand(rows, -1, -1)


def slow_log_prob(law_of: type, logits: list[float], picks: list[int]) -> float:
    """By the definition, one softmax after another or one sum over all sets."""
    if law_of is PlackettLuce:
        left, total = set(range(len(logits))), 0.0
        for pick in picks:
            total += logits[pick] - math.log(sum(math.exp(logits[i]) for i in left))
            left.remove(pick)
        return total
    sets = itertools.combinations(range(len(logits)), len(picks))
    return sum(logits[i] for i in picks) - math.log(sum(math.exp(sum(logits[i] for i in s)) for s in sets))


def chi_square(picks: torch.Tensor, every: torch.Tensor, chances: torch.Tensor) -> float:
    """How many standard deviations the frequencies of picks [G, K] lie from `chances` of every [all, K]."""
    counts = (picks[:, None] == every[None]).all(-1).sum(0)
    assert int(counts.sum()) == len(picks), "a sample is not in the list of all"
    expected = chances * len(picks)
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
def test_log_prob_is_the_definition_and_sums_to_one(law_of, k):
    every = every_picks(law_of, 6, k, 2)
    log_prob = law_of(LOGITS, k).log_prob(every)
    assert torch.allclose(log_prob.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    for row, index in [(0, 0), (1, 0), (0, every.shape[1] // 2), (1, every.shape[1] - 1)]:
        slow = slow_log_prob(law_of, LOGITS[row].tolist(), every[row, index].tolist())
        assert float(log_prob[row, index]) == pytest.approx(slow, abs=1e-12)


def test_one_pick_is_the_softmax_all_picks_are_certain_and_between_the_families_differ():
    one = torch.arange(6)[None, :, None].expand(2, -1, -1)
    for law_of in (PlackettLuce, ConditionalBernoulli):
        assert torch.allclose(law_of(LOGITS, 1).log_prob(one), LOGITS.log_softmax(-1), atol=1e-12)
    certain = ConditionalBernoulli(LOGITS, 6)
    assert torch.allclose(certain.log_prob(certain.mode()[:, None]), torch.zeros(2, 1, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(certain.inclusion(), torch.ones(2, 6, dtype=torch.float64), atol=1e-12)
    orders = torch.tensor([[[0, 2], [2, 0]]] * 2)
    ordered = PlackettLuce(LOGITS, 2).log_prob(orders).logsumexp(-1)
    assert ((ordered - ConditionalBernoulli(LOGITS, 2).log_prob(orders)[:, 0]).abs() > 0.01).all()


def test_the_first_picks_of_plackett_luce_have_the_law_of_a_smaller_k():
    every = every_picks(PlackettLuce, 6, 3, 1)
    chances = PlackettLuce(LOGITS[:1], 3).log_prob(every).exp()[0]
    starts = (every[0, :, :2] == torch.tensor([4, 1])).all(-1)
    shorter = PlackettLuce(LOGITS[:1], 2).log_prob(torch.tensor([[[4, 1]]])).exp()
    assert float(chances[starts].sum()) == pytest.approx(float(shorter), abs=1e-12)


def test_steps_add_up_to_the_log_prob():
    law = PlackettLuce(LOGITS, torch.tensor([2, 4]))
    picks = law.sample(5, generator=generator())
    steps = law.step_log_probs(picks)
    assert torch.allclose(steps.sum(-1), law.log_prob(picks))
    assert (steps[0, :, 2:] == 0).all()
    assert (steps[1] < 0).all()
    first = LOGITS[:, None].expand(-1, 5, -1).log_softmax(-1).gather(-1, picks[..., :1])
    assert torch.allclose(steps[..., :1], first)


@BOTH
@pytest.mark.parametrize("antithetic", [False, True])
def test_samples_have_the_frequencies_of_the_law(law_of, antithetic):
    every = every_picks(law_of, 5, 3, 1)
    law = law_of(LOGITS[:1, :5].float(), 3)
    chances = law.log_prob(every).exp()[0]
    picks = law.sample(20000, generator=generator(3), antithetic=antithetic)[0]
    # The two of a pair depend on each other, so either half is judged alone.
    for half in (picks[::2], picks[1::2]):
        assert abs(chi_square(half, every[0], chances)) < 4
    wrong = law_of(LOGITS[:1, :5].float() * 0.9, 3).log_prob(every).exp()[0]
    assert chi_square(picks[::2], every[0], wrong) > 4, "the test has no power"


@BOTH
def test_ragged_rows_have_the_frequencies_of_their_own_law(law_of):
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    logits = LOGITS.masked_fill(torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool(), -torch.inf)
    law = law_of(logits, torch.tensor([2, 3]), mask)
    picks = law.sample(10000, generator=generator(1))
    for row, (items, k) in enumerate([([0, 1, 3, 4], 2), ([0, 2, 3, 4, 5], 3)]):
        alone = law_of(logits[row, items], k)
        every = every_picks(law_of, len(items), k, 1)
        named = torch.tensor(items)[every]
        assert (picks[row, :, k:] == -1).all()
        assert abs(chi_square(picks[row, :, :k], named[0], alone.log_prob(every).exp()[0])) < 4
        filled = torch.nn.functional.pad(named, (0, 3 - k), value=-1)
        both = torch.cat([filled, picks[1 - row, :1].expand(1, filled.shape[1], -1)])
        both = both if row == 0 else both.flip(0)
        assert torch.allclose(law.log_prob(both)[row], alone.log_prob(every)[0], atol=1e-12)


@BOTH
def test_a_generator_repeats_and_antithetic_pairs_mirror_each_other(law_of):
    law = law_of(torch.zeros(3, 8), 4)
    first = law.sample(6, generator=generator(5))
    assert torch.equal(first, law.sample(6, generator=generator(5)))
    assert not torch.equal(first, law.sample(6, generator=generator(6)))
    assert law.sample(7, antithetic=True).shape == (3, 7, 4)
    member = picks_to_mask(law.sample(6, generator=generator(5), antithetic=True), 8)
    assert torch.equal(member[:, ::2], ~member[:, 1::2])  # equal logits, half of them: u and 1 - u choose complements


def test_the_mode_is_the_top_k_with_ties_by_lower_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    k = torch.tensor([3, 2])
    assert PlackettLuce(logits, k).mode().tolist() == [[1, 2, 4], [0, 1, -1]]
    assert ConditionalBernoulli(logits.flip(-1), k).mode().tolist() == [[0, 2, 3], [0, 1, -1]]
    for law_of in (PlackettLuce, ConditionalBernoulli):
        law = law_of(LOGITS, 3)
        every = every_picks(law_of, 6, 3, 2)
        assert torch.allclose(law.log_prob(law.mode()[:, None])[:, 0], law.log_prob(every).max(-1).values)


def test_sets_normalizer_inclusion_entropy_and_kl_are_those_of_the_enumeration():
    every = every_picks(ConditionalBernoulli, 6, 3, 2)
    law, other = ConditionalBernoulli(LOGITS, 3), ConditionalBernoulli(OTHERS, 3)
    log_prob, member = law.log_prob(every), picks_to_mask(every, 6)
    score = (LOGITS[:, None] * member).sum(-1)
    assert torch.allclose(law.log_normalizer(), score.logsumexp(-1), atol=1e-12)
    assert torch.allclose(law.inclusion(), (log_prob.exp()[..., None] * member).sum(1), atol=1e-12)
    assert torch.allclose(law.inclusion().sum(-1), torch.full((2,), 3.0, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(law.entropy(), -(log_prob.exp() * log_prob).sum(-1), atol=1e-12)
    assert torch.allclose(law.kl(other), (log_prob.exp() * (log_prob - other.log_prob(every))).sum(-1), atol=1e-12)
    assert torch.allclose(law.kl(law), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    live = LOGITS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ConditionalBernoulli(live, 3).log_normalizer().sum(), live)
    assert torch.allclose(slope, law.inclusion(), atol=1e-12)
    assert float(ConditionalBernoulli(torch.zeros(9), 4).entropy()) == pytest.approx(math.log(math.comb(9, 4)))


def test_rare_items_keep_their_relative_inclusion():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0, -60.0, 70.0], dtype=torch.float64)
    every = every_picks(ConditionalBernoulli, 6, 3, 1)[0]
    score, member = logits[every].sum(-1), picks_to_mask(every, 6)
    slow = score[member[:, 4]].logsumexp(-1) - score.logsumexp(-1)
    assert float(ConditionalBernoulli(logits, 3).inclusion()[0, 4].log()) == pytest.approx(float(slow), abs=1e-9)


@pytest.mark.parametrize("k", [1, 30, 2048, 4000, 4096])
def test_equal_logits_give_every_set_of_many_items_the_same_chance(k):
    law = ConditionalBernoulli(torch.full((4096,), 7.0, dtype=torch.float64), k)
    sets = math.lgamma(4097) - math.lgamma(k + 1) - math.lgamma(4097 - k)
    assert float(law.entropy()) == pytest.approx(sets, abs=1e-8)
    assert float(law.log_normalizer()) == pytest.approx(sets + 7 * k, abs=1e-8)
    assert torch.allclose(law.inclusion(), torch.full((1, 4096), k / 4096, dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("edge", [2.0**-53, 1 - 2.0**-53])
def test_the_last_bit_of_the_noise_still_gives_sets_of_k_real_items(edge, monkeypatch):
    def noise(logits, shape, *_):
        return torch.full((logits.shape[0], *shape), edge, dtype=torch.float64)

    monkeypatch.setattr("gripvlm.grip.policy.conditional_bernoulli.uniform_noise", noise)
    logits = torch.randn(40, 37, generator=generator()) * 3
    mask = torch.rand(40, 37, generator=generator()) < 0.7
    picks = ConditionalBernoulli(logits, 9, mask).sample(1)
    assert (picks_to_mask(picks, 37)[:, 0] & mask).sum(-1).tolist() == [9] * 40


def test_step_entropy_and_step_kl_are_those_of_the_softmax_over_what_is_left():
    law, other = PlackettLuce(LOGITS, 6), PlackettLuce(OTHERS, 6)
    picks = law.sample(4, generator=generator())
    entropy, divergence = law.step_entropy(picks), law.step_kl(other, picks)
    for row, sample, step in itertools.product(range(2), range(4), range(6)):
        left = picks[row, sample, step:]
        mine, theirs = LOGITS[row, left].log_softmax(-1), OTHERS[row, left].log_softmax(-1)
        assert float(entropy[row, sample, step]) == pytest.approx(float(-(mine.exp() * mine).sum()), abs=1e-12)
        expected = float((mine.exp() * (mine - theirs)).sum())
        assert float(divergence[row, sample, step]) == pytest.approx(expected, abs=1e-12)
    assert float(law.step_kl(law, picks).abs().max()) < 1e-12


def test_estimates_of_the_ordered_law_are_unbiased():
    law, other = PlackettLuce(LOGITS, torch.tensor([3, 3])), PlackettLuce(OTHERS, 3)
    every = every_picks(PlackettLuce, 6, 3, 2)
    log_prob = law.log_prob(every)
    exact = -(log_prob.exp() * log_prob).sum(-1)
    assert torch.allclose((log_prob.exp() * law.entropy(every)).sum(-1), exact, atol=1e-12)
    exact = (log_prob.exp() * (log_prob - other.log_prob(every))).sum(-1)
    assert torch.allclose((log_prob.exp() * law.kl(other, every)).sum(-1), exact, atol=1e-12)
    spread = (log_prob.exp() * (log_prob + (log_prob.exp() * -log_prob).sum(-1, keepdim=True)) ** 2).sum(-1)
    estimate = law.entropy(every)
    mean = (log_prob.exp() * estimate).sum(-1, keepdim=True)
    assert ((log_prob.exp() * (estimate - mean) ** 2).sum(-1) < 0.5 * spread).all(), "no better than -log_prob"


@BOTH
def test_the_score_has_mean_zero(law_of):
    live = LOGITS.clone().requires_grad_()
    law = law_of(live, 3)
    log_prob = law.log_prob(every_picks(law_of, 6, 3, 2))
    (mean,) = torch.autograd.grad((log_prob.detach().exp() * log_prob).sum(), live, retain_graph=True)
    assert float(mean.abs().max()) < 1e-12
    (single,) = torch.autograd.grad(log_prob[:, 0].sum(), live)
    assert float(single.abs().max()) > 0.1


def ragged(law_of: type, logits: torch.Tensor):
    return law_of(logits, torch.tensor([2, 4]), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool())


@BOTH
def test_gradients_are_those_of_finite_differences(law_of):
    picks = ragged(law_of, LOGITS).sample(3, generator=generator())
    one, two = LOGITS.clone().requires_grad_(), OTHERS.clone().requires_grad_()
    assert gradcheck(lambda s: ragged(law_of, s).log_prob(picks), one)
    if law_of is PlackettLuce:
        assert gradcheck(lambda s: ragged(law_of, s).step_log_probs(picks), one)
        assert gradcheck(lambda s: ragged(law_of, s).step_entropy(picks), one)
        assert gradcheck(lambda s, r: ragged(law_of, s).step_kl(ragged(law_of, r), picks), (one, two))
    else:
        assert gradcheck(lambda s: ragged(law_of, s).inclusion(), one)
        assert gradcheck(lambda s: ragged(law_of, s).entropy(), one)
        assert gradcheck(lambda s, r: ragged(law_of, s).kl(ragged(law_of, r)), (one, two))
        assert gradgradcheck(lambda s: ragged(law_of, s).log_normalizer(), one)


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
def test_at_the_edges_samples_are_valid_and_all_is_finite(law_of, case):
    logits, mask, k = case
    live = logits.clone().requires_grad_()
    law = law_of(live, k, mask)
    picks = law.sample(4, generator=generator(), antithetic=bool(k[0] % 2))
    member = picks_to_mask(picks, law.n)
    assert torch.equal(member.sum(-1), k[:, None].expand(-1, 4))
    assert not (member & ~(mask & (logits > -torch.inf))[:, None]).any()
    assert torch.equal((picks == -1).sum(-1), int(k.max()) - k[:, None].expand(-1, 4))
    calm = law_of(torch.zeros_like(live), k, mask)
    values = [law.log_prob(picks), law.log_prob(law.mode()[:, None])]
    if law_of is PlackettLuce:
        values += [law.step_entropy(picks), law.step_kl(calm, picks)]
        assert all((value >= 0).all() for value in values[2:])
    else:
        values += [law.inclusion(), law.entropy(), law.kl(calm), law.log_normalizer()]
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
    law = PlackettLuce(logits, k)
    picks = law.sample(2, generator=generator(1))
    ordered = logits[0].double()[picks[0, 1]]
    tail = logits[0].double()[~picks_to_mask(picks, n)[0, 1]].logsumexp(-1)
    slow = sum(float(ordered[j] - torch.logaddexp(ordered[j:].logsumexp(-1), tail)) for j in range(k))
    assert law.log_prob(picks).dtype == torch.float32
    assert float(law.log_prob(picks)[0, 1]) == pytest.approx(slow, rel=1e-6)
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
    """The trap of training: after the dominant picks, 1 - (what was picked) is rounding noise in float32."""
    logits = torch.tensor([[60.0, 40.0, 1.0, 0.0, -1.0]])
    picks = torch.tensor([[[0, 1, 3]]])
    mass = logits[0].softmax(-1)[picks[0, 0]]
    subtracted = (mass / (1 - torch.cat([mass.new_zeros(1), mass[:-1]]).cumsum(0))).log()
    steps = PlackettLuce(logits, 3).step_log_probs(picks)[0, 0]
    expected = float(logits[0, 2:].double().log_softmax(-1)[1])
    assert float(steps[2]) == pytest.approx(expected, rel=1e-6)
    assert float(steps[0]) == pytest.approx(-math.exp(-20), rel=1e-6)  # 1 - p too is kept
    assert not abs(float(subtracted[2]) - expected) < 1, "the trap is gone: this test has no power"


def test_peaked_sets_keep_the_chance_of_what_lies_near_the_boundary():
    logits = torch.tensor([[1e4, 5e3, 1.0, 0.0, -1.0, -1e4]])
    law = ConditionalBernoulli(logits, 3)
    assert torch.allclose(law.inclusion()[0, 2:5], torch.tensor([1.0, 0.0, -1.0]).softmax(-1), rtol=1e-6)
    assert float(law.log_prob(torch.tensor([[[0, 1, 3]]]))) == pytest.approx(-1.4076059644443804, rel=1e-6)
    assert float(law.log_normalizer()) == pytest.approx(15001.4076, rel=1e-6)


@BOTH
def test_band_forces_the_sure_items_and_leaves_an_exact_law_over_the_rest(law_of):
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2], [2.0, 3, 4, 5, 6, 7, 8, -torch.inf]])
    k = torch.tensor([4, 2])
    forced, allowed = band_mask(logits, k, 2)
    assert forced.int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    assert allowed.int().tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]
    law = law_of(logits, k - forced.sum(-1), mask=allowed & ~forced)
    chosen = picks_to_mask(law.sample(500, generator=generator()), 8) | forced[:, None]
    assert torch.equal(chosen.sum(-1), k[:, None].expand(-1, 500))
    assert not (chosen & ~allowed[:, None]).any()
    assert len({tuple(row) for row in chosen[0].tolist()}) == 6  # all C(4, 2)
    every = torch.stack([every_picks(law_of, 4, 2, 1)[0] + 2, every_picks(law_of, 4, 2, 1)[0] + 3])
    assert torch.allclose(law.log_prob(every).exp().sum(-1), torch.ones(2))
    forced, allowed = band_mask(torch.zeros(5), 5, 1)
    assert forced.int().tolist() == [[1, 1, 1, 1, 0]]
    assert allowed.all()


@BOTH
def test_half_precision_and_inference_mode(law_of):
    half = torch.randn(2, 9, generator=generator()).bfloat16()
    picks = law_of(half, 4).sample(3, generator=generator())
    assert law_of(half, 4).log_prob(picks).dtype == torch.float32
    assert torch.equal(law_of(half, 4).log_prob(picks), law_of(half.float(), 4).log_prob(picks))
    with torch.inference_mode():
        law = law_of(half.float(), 4)
        values = law.entropy(picks) if law_of is PlackettLuce else law.inclusion()
    normal = law_of(half.float(), 4)
    assert torch.allclose(values, normal.entropy(picks) if law_of is PlackettLuce else normal.inclusion())
