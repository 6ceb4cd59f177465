"""What `gripvlm bench` says in words follows from its numbers: rows made by hand, no clock."""

from __future__ import annotations

import pytest

from gripvlm.bench import sentences
from gripvlm.bench.words import fit_sentences


def made(pruner="norm", kept=8.0, whole=(0.5, 0.45, 0.55), seconds=None, roofline=None, **more):
    """A row with round numbers."""
    parts = {"vision": 1.0, "pruner": 0.1, "overhead": 0.1, "other": 0.1, "prefill": 2.0, "decode": 4.0} | (
        seconds or {}
    )
    times = parts | {"whole": sum(parts.values())}
    same = dict(zip(("median", "low", "high"), whole, strict=True))
    return {
        "batch": 1,
        "prompt": 64,
        "kind": "pruned",
        "keep": 0.5,
        "setting": f"{pruner} 0.5",
        "pruner": pruner,
        "kept": kept,
        "visual_tokens": 16.0,
        "failed": None,
        "seconds": {name: {"median": value} for name, value in times.items()},
        "roofline": {"vision": 0.5, "prefill": 0.5, "decode": 0.5} | (roofline or {}),
        "to_full": {
            "whole": same,
            "first_token": {"median": 0.4},
            "prefill": {"median": 0.3},
            "added": {"median": 0.05},
            "kv_bytes": 0.25,
        },
        "to_limit": {"whole": {"median": 1.25}},
    } | more


def test_the_sentence_says_what_is_gained():
    (text,) = sentences([made()])
    assert text.startswith("Batch 1, 64 text tokens: norm keeps 8 of 16 visual tokens a prompt and takes 0.50 of the")
    assert "(quartiles 0.45 to 0.55): 2.00x as fast" in text
    assert "the first token comes after 0.40 of its unpruned time, the prefill alone takes 0.30" in text
    assert "0.25 of the bytes" in text
    assert "costs 5.0 % of the unpruned prefill" in text
    assert "takes 0.80 of that time" in text


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ((0.9, 0.8, 0.999), "1.11x as fast"),
        ((0.9, 0.8, 1.0), "no difference these turns show"),
        ((1.1, 0.99, 1.2), "no difference these turns show"),
        ((1.2, 1.1, 1.3), "pruning makes it slower"),
    ],
)
def test_a_gain_is_said_only_where_the_quartiles_agree(whole, said):
    (text,) = sentences([made(whole=whole)])
    verdicts = ("x as fast", "no difference these turns show", "pruning makes it slower")
    assert said in text
    assert sum(verdict in text for verdict in verdicts) == 1


@pytest.mark.parametrize(
    ("seconds", "bound", "advice"),
    [
        ({"vision": 9.0}, "the vision encoder", "use smaller pictures"),
        ({"decode": 9.0}, "decoding", "larger batches or shorter answers"),
        ({"prefill": 9.0}, "the language model's prefill", "fewer visual tokens"),
        ({"pruner": 3.0, "overhead": 3.0, "other": 3.0}, "the overhead of pruning itself", "cheaper pruner"),
    ],
)
def test_the_sentence_names_the_longest_part(seconds, bound, advice):
    (text,) = sentences([made(seconds=seconds)])
    assert f"What bounds you now is {bound} ({bound} " in text
    assert advice in text


@pytest.mark.parametrize(("reached", "said"), [(0.19, "runs at 19 % of"), (0.001, "less than 1 % of"), (0.2, None)])
def test_far_below_the_roofline_is_said(reached, said):
    (text,) = sentences([made(roofline={"decode": reached})])
    assert (said in text) if said else ("It runs at" not in text)


def test_fewer_tokens_are_advised_only_where_they_help():
    slow = {"seconds": {"prefill": 9.0}}
    assert "Keeping fewer visual tokens" in sentences([made(**slow)])[0]
    assert "Keeping fewer visual tokens" not in sentences([made(**slow, roofline={"prefill": 0.01})])[0]


def test_the_sentence_speaks_of_the_smallest_budget_and_its_fastest_pruner():
    slow, quick = made("slow", 7.75), made("quick", seconds={"decode": 3.0})
    more = made("more", 12.0, seconds={"decode": 1.0}, keep=0.75)
    other = made("elsewhere", batch=8)
    one, two = sentences([slow, quick, more, other])
    assert one.startswith("Batch 1, 64 text tokens: quick keeps 8")
    assert two.startswith("Batch 8, 64 text tokens: elsewhere")
    (nothing,) = sentences([made(kind="full")])
    assert nothing == "Batch 1, 64 text tokens: no pruned run was measured."


def fitted(fits, fails, to_full=None, setting="full", prompt=64):
    kind = "full" if setting == "full" else "pruned"
    return {"prompt": prompt, "kind": kind, "setting": setting, "most": 512, "fits": fits, "fails": fails} | {
        "to_full": to_full
    }


def test_a_sentence_says_how_many_prompts_fit():
    one, two = fit_sentences(
        [
            fitted(0, 1),
            fitted(3, 4, setting="norm 0.1"),
            fitted(100, 101, 1.0, prompt=8),
            fitted(250, 256, 2.5, "norm 0.1", 8),
            fitted(512, None, None, "norm 0.05", 8),
        ]
    )
    assert one == (
        "64 text tokens: the largest batch that the device's memory holds is none, not even 1, unpruned; 3 with "
        "norm 0.1."
    )
    assert two == (
        "8 text tokens: the largest batch that the device's memory holds is 100 unpruned; 250 with norm 0.1 (2.50 "
        "times the unpruned one); at least 512 (--fit 512 looks no further) with norm 0.05."
    )
    assert fit_sentences([]) == []
