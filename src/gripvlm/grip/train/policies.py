"""The policy of a scorer: its logits as a distribution over subsets."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gripvlm.errors import TrainError
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import Rounds
from gripvlm.grip.scorer import Scorer, TowerStage

__all__ = ["policy_of"]


def policy_of(
    scorer: Scorer | TowerStage, inputs: ScorerInputs, counts: Tensor, temperature: float = 1.0
) -> PlackettLuce | Rounds:
    """The distribution over subsets of `counts` [S] tokens of each sequence.

    Raises:
        TrainError: logits that are not finite.
    """
    logits = _finite(inputs.score(scorer, counts), inputs.valid) / temperature
    penalty = inputs.penalty(scorer, counts)
    if penalty.rounds == 1:
        return PlackettLuce(logits, counts, inputs.valid)
    penalty.close.tabulate()  # many draws of the same tokens
    return Rounds(logits, counts, inputs.valid, replace(penalty, weight=penalty.weight / temperature))


def _finite(logits: Tensor, valid: Tensor) -> Tensor:
    """The logits, if they are finite where `valid`.

    Raises:
        TrainError: they are not.
    """
    # The policy would refuse them as well, without saying what to do.
    if not bool(logits[valid].isfinite().all()):
        raise TrainError(
            "the scorer has diverged, its logits are not finite any more: lower --learning-rate, and use another "
            "--output-dir if this one has a checkpoint"
        )
    return logits
