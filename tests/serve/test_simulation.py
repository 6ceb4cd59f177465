"""experiments/serving: the simulated fleet against queueing theory, and what it must not lose."""

from __future__ import annotations

import pytest

from experiments.serving.simulate import Curves, Fleet, arrivals_of, between, load_at, simulate

MEASURED = {
    "tower": 0.1,
    "rows": [
        {"batch": size, "keep": keep, "prefill": size * 0.9 * keep, "step": 0.0}
        for size in (1, 4)
        for keep in (1.0, 0.5)
    ],
}
CURVES = Curves.of(MEASURED)


def fleet(replicas: int = 1, budgets: tuple[float, ...] = (1.0,), target: float = 5.0, batch: int = 1) -> Fleet:
    return Fleet(replicas, budgets, target, tokens=1, max_batch=batch, max_queue=10**6)


def test_curves_between_what_was_measured():
    assert between({1: 1.0, 4: 4.0}, 3) == 3.0
    assert CURVES.batch(0.5, 3, tokens=5) == pytest.approx((0.3 + 1.35, 0.3 + 1.35))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_server_is_an_m_d_1_queue(load):
    """Pollaczek and Khinchine: the mean wait of constant service S is S load / (2 (1 - load)); its median is near."""
    arrivals, _ = arrivals_of({"base": load}, 1.0, 40_000, seed=0)
    found = simulate(CURVES, fleet(target=1e-9), arrivals, seed=0)
    assert found["in_time"] == 0
    # No request waits at all with probability 1 - load: its first token comes after S = 1.
    least = simulate(CURVES, fleet(target=1.0 + 1e-9), arrivals, seed=0)["in_time"]
    assert least == pytest.approx(1 - load, abs=0.02)


def test_a_lost_replica_loses_no_request_and_costs_time():
    arrivals, duration = arrivals_of({"base": 0.8}, 4.0, 4_000, seed=1)
    whole = simulate(CURVES, fleet(4), arrivals, seed=1)
    without = simulate(CURVES, fleet(4), arrivals, seed=1, outage=(1, duration / 3, 2 * duration / 3))
    assert without["requests"] == whole["requests"]
    assert without["in_time"] < whole["in_time"]
    assert (
        simulate(CURVES, fleet(1), arrivals[:50], seed=1, outage=(1, 0.0, 1.0))["requests"] == 50
    )  # one must be there


def test_a_full_queue_refuses():
    few = Fleet(1, (1.0,), 5.0, tokens=1, max_batch=1, max_queue=2)
    found = simulate(CURVES, few, [0.0] * 10, seed=0)
    assert found["refused"] == 0.7
    assert found["in_time"] == pytest.approx(0.3)


def test_the_controller_serves_a_tripled_load_that_the_largest_budget_cannot():
    shape = {"base": 0.5, "factor": 3.0, "from": 0.3, "to": 0.6}
    arrivals, _ = arrivals_of(shape, 4.0, 6_000, seed=2)
    always = simulate(CURVES, fleet(4, (1.0,), 10.0, batch=4), arrivals, seed=2)
    chosen = simulate(CURVES, fleet(4, (1.0, 0.5), 10.0, batch=4), arrivals, seed=2)
    assert chosen["in_time"] > always["in_time"] + 0.1
    assert 0.5 < chosen["mean_keep"] < 1
    assert chosen["at 1"] + chosen["at 0.5"] == pytest.approx(1)


def test_arrivals_follow_the_shape():
    assert [load_at({"base": 1.0, "factor": 3.0, "cycle": True})(at) for at in (0, 0.5, 1)] == pytest.approx([1, 3, 1])
    burst = load_at({"base": 1.0, "factor": 2.0, "every": 0.1, "share": 0.5})
    assert [burst(at) for at in (0.01, 0.06, 0.11)] == [2.0, 1.0, 2.0]
    times, duration = arrivals_of({"base": 1.0, "factor": 3.0, "from": 0.5, "to": 1.0}, 10.0, 8_000, seed=0)
    assert len(times) == pytest.approx(8_000, rel=0.05)
    assert times == sorted(times)
    assert sum(t > duration / 2 for t in times) / len(times) == pytest.approx(0.75, abs=0.02)
