"""The policy of a scorer: its logits as a distribution over subsets."""

from __future__ import annotations

from torch import Tensor

from gripvlm.errors import TrainError
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import Rounds
from gripvlm.grip.scorer import Scorer

__all__ = ["policy_of"]


def policy_of(scorer: Scorer, inputs: ScorerInputs, counts: Tensor, temperature: float = 1.0) -> PlackettLuce | Rounds:
    """The distribution over subsets of `counts` [S] tokens of each sequence.

    Raises:
        TrainError: logits that are not finite, here or in a later round.
    """
    scored = inputs.read(scorer, counts)
    first = _finite(scored.logits, inputs.valid) / temperature
    if scorer.config.rounds == 1:
        return PlackettLuce(first, counts, inputs.valid)
    rescore = scorer.rescore(scored, inputs.sizes)

    def later(kept: Tensor, left: Tensor) -> Tensor:
        logits = rescore(kept, left)
        return _finite(logits, inputs.valid[:, None].expand_as(logits)) / temperature

    return Rounds(first, counts, inputs.valid, scorer.config.rounds, later)


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
