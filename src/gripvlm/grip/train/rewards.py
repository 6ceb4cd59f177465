"""Rewards: plain functions `reward(rollout) -> [R] tensor`, higher is better; several are added with weights.

A function with an argument `completions`, as TRL's are, is called with the decoded answers and the columns of the
questions, and returns a list of numbers.

A reward that reads `Rollout.logits` needs them to be kept: `reward.needs` is {"logits"} then, and empty where it does
not. A function of a user's own that says nothing gets them.

What a reward may not do is hide a failure: NaN and infinity stop training with the sample's id.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import GripError, TrainError
from gripvlm.grip.train.config import parse_weights, split_names
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
    try:
        wanted = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a function of C
        return reward
    return _of_completions(reward, wanted) if "completions" in wanted else reward


def name_of(reward: Reward) -> str:
    """As it is called in messages and metrics."""
    return getattr(reward, "__name__", type(reward).__name__)


def _of_completions(function: Callable[..., Any], wanted: Mapping[str, inspect.Parameter]) -> Reward:
    """A reward from `function(completions, **columns) -> [R] numbers`; it gets the columns that it has arguments for.

    They are `prompts` (the questions), and a sample's `id`, `question`, `answer`, `answers`, `choices` and `family`.
    """
    everything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted.values())

    def reward(rollout: Rollout) -> Tensor:
        samples, tasks = rollout.samples, rollout.tasks
        columns: dict[str, list[Any]] = {
            name: [getattr(sample, name) for sample in samples]
            for name in ("id", "question", "answer", "answers", "choices", "family")
        }
        columns["prompts"] = [task.prompt(sample) for task, sample in zip(tasks, samples, strict=True)]
        told = {name: column for name, column in columns.items() if everything or name in wanted}
        return torch.tensor(function(completions=rollout.decode(), **told), device=rollout.mask.device)

    reward.__name__ = name_of(function)
    reward.needs = frozenset()  # type: ignore[attr-defined]
    return reward


class Rewards:
    """Several rewards as one, their weighted sum.

    Args:
        rewards: names, `module:function`, or functions.
        weights: one for each, as `reward_weights` has them; "" for 1.

    Raises:
        TrainError: an unknown reward, two of one name, or another number of weights.
    """

    def __init__(self, rewards: Sequence[str | Reward], weights: str = "") -> None:
        found = [get_reward(reward) for reward in rewards]
        names = [name_of(reward) for reward in found]
        if not found:
            raise TrainError("reward_funcs = '': name at least one reward, such as probability")
        if twice := [name for name in names if names.count(name) > 1]:
            raise TrainError(f"reward_funcs has {twice[0]} twice: name it once, and give it a weight")
        self.parts = list(zip(names, found, parse_weights(weights, names), strict=True))
        self.needs = frozenset().union(*(needs_of(reward) for reward in found))
        self.__name__ = "+".join(names)

    @classmethod
    def named(cls, text: str, weights: str = "") -> Rewards:
        """From names with commas."""
        return cls(split_names(text), weights)

    def __call__(self, rollout: Rollout) -> Tensor:
        return scores_of(self, rollout)[0]


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


def scores_of(reward: Reward, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward's values [R], and those of each of the rewards that it adds.

    Raises:
        TrainError: as `checked_reward`.
    """
    parts = reward.parts if isinstance(reward, Rewards) else [(name_of(reward), reward, 1.0)]
    each = {name: checked_reward(one, rollout) for name, one, _ in parts}
    total = torch.stack([weight * each[name] for name, _, weight in parts]).sum(0)
    return total, each


def checked_reward(reward: Reward, rollout: Rollout) -> Tensor:
    """The reward's values [R] as float32.

    Raises:
        TrainError: it raised, returned another shape, or a value that is not finite; with the sample's id.
    """
    rows = len(rollout.samples)
    name = name_of(reward)
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
