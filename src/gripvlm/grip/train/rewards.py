"""Rewards: plain functions `reward(rollout) -> [R] tensor`, higher is better.

A reward that reads `Rollout.logits` needs them to be kept: `reward.needs` is {"logits"} then, and empty where it does
not. A function of a user's own that says nothing gets them.

What a reward may not do is hide a failure: NaN and infinity stop training with the sample's id.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import GripError, TrainError
from gripvlm.grip.train.rollout import Rollout

Reward: TypeAlias = Callable[[Rollout], Tensor]


def log_prob(rollout: Rollout) -> Tensor:
    """Mean log-probability of the forced answer's tokens (TwigVLM++, arXiv 2503.14075)."""
    return rollout.log_probs.sum(-1) / rollout.mask.sum(-1)


def probability(rollout: Rollout) -> Tensor:
    """exp of `log_prob`: between 0 and 1, so that no hopeless question outweighs all others."""
    return log_prob(rollout).exp()


def agreement(rollout: Rollout) -> Tensor:
    """Minus the mean KL divergence from the unpruned model's next-token distribution; needs no labels."""
    full, pruned = rollout.full_logits.log_softmax(-1), rollout.logits.log_softmax(-1)
    kl = (full.exp() * (full - pruned)).sum(-1)
    return -(kl * rollout.mask).sum(-1) / rollout.mask.sum(-1)


def exact_match(rollout: Rollout) -> Tensor:
    """1 where greedy decoding would give the forced answer, by the teacher-forced logits."""
    return rollout.exact


def task_score(rollout: Rollout) -> Tensor:
    """The task's own score of the decoded answer; costs a generation.

    Raises:
        TrainError: a sample has no answer to compare with.
    """
    if unlabelled := [sample.id for sample in rollout.samples if not sample.answer]:
        raise TrainError(f"sample {unlabelled[0]!r} has no answer to compare with: use the reward agreement")
    pairs = zip(rollout.tasks, rollout.samples, rollout.decode(), strict=True)
    return torch.tensor([task.score(text, sample) for task, sample, text in pairs], device=rollout.mask.device)


REWARDS: dict[str, Reward] = {
    "log_prob": log_prob,
    "probability": probability,
    "agreement": agreement,
    "exact_match": exact_match,
    "task_score": task_score,
}
for _reward in (log_prob, probability, exact_match, task_score):
    _reward.needs = frozenset()  # type: ignore[attr-defined]


def needs_of(reward: Reward) -> frozenset[str]:
    """Which costly parts of a rollout a reward reads; all of them where it does not say."""
    return getattr(reward, "needs", frozenset({"logits"}))


def get_reward(name: str | Reward) -> Reward:
    """A reward by name, by `module:function`, or as it is.

    Raises:
        TrainError: neither.
    """
    reward: Reward = name if callable(name) else by_name("reward", name, REWARDS)
    return reward


def by_name(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """What `known` has under the name, or the function of a user's own that `module:function` names.

    Raises:
        TrainError: neither; `kind` says what was looked for.
    """
    if name in known:
        return known[name]
    module, colon, function = name.partition(":")
    if colon:
        try:
            value = getattr(importlib.import_module(module), function)
        except (Exception, SystemExit) as error:  # whatever a user's module does
            raise TrainError(f"no {kind} {name!r}: {type(error).__name__}: {error}") from error
        if callable(value):
            return value
    raise TrainError(f"unknown {kind} {name!r}: known are {', '.join(known)}, or module:function of your own")


def checked_reward(reward: Reward, rollout: Rollout) -> Tensor:
    """The reward's values [R] as float32.

    Raises:
        TrainError: it raised, returned another shape, or a value that is not finite; with the sample's id.
    """
    rows = len(rollout.samples)
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        values = reward(rollout)
    # Ours says already what to change.
    except GripError:
        raise
    except Exception as error:
        # A function of a user may raise anything; its author needs the samples to look at.
        ids = list(dict.fromkeys(sample.id for sample in rollout.samples))
        raise TrainError(
            f"reward {name!r} raised {type(error).__name__}: {error} (samples {', '.join(ids)})"
        ) from error
    if not isinstance(values, Tensor) or values.shape != (rows,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise TrainError(f"reward {name!r} must return a tensor ({rows},), got {got}: one value for each row")
    values = values.detach().to(rollout.mask.device, torch.float32)
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0])
        raise TrainError(
            f"reward {name!r} is {float(values[row])} for sample {rollout.samples[row].id!r}: training stops, as no "
            "number could stand for it"
        )
    return values
