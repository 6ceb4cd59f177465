"""What the laws of k-subsets refuse, and what their errors say."""

from __future__ import annotations

import pytest
import torch

from gripvlm.errors import InputError
from gripvlm.grip.policy import ConditionalBernoulli, PlackettLuce, band_mask

LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.7, -0.4], [1.5, 1.5, -3.0, 4.0, 0.1, 0.2]])

REFUSED = [
    (lambda: PlackettLuce([1.0, 2.0], 1), "logits are list.*type torch.as_tensor"),
    (lambda: PlackettLuce(torch.ones(3, dtype=torch.long), 1), "logits are torch.int64"),
    (lambda: PlackettLuce(torch.ones(1, 2, 3), 1), r"shape \[1, 2, 3\].*type logits.view"),
    (lambda: PlackettLuce(torch.ones(0), 1), r"shape \[0\]"),
    (lambda: PlackettLuce(torch.tensor([1.0, torch.nan]), 1), r"logits\[0, 1\] = nan"),
    (lambda: ConditionalBernoulli(torch.tensor([torch.inf, 1.0]), 1), r"logits\[0, 0\] = inf"),
    (lambda: PlackettLuce(torch.tensor([1e21, 1.0]), 1), "finite ones up to 1e[+]20"),
    (lambda: PlackettLuce(torch.ones(2, 3), 4), "k=4 in row 0, which has 3 items.*type k=3 or less"),
    (lambda: PlackettLuce(torch.tensor([-torch.inf, 1.0]), 2), "k=2 in row 0, which has 1 items"),
    (lambda: PlackettLuce(torch.ones(2, 3), 2, torch.tensor([[1, 1, 1], [0, 1, 0]]).bool()), "k=2 in row 1"),
    (lambda: PlackettLuce(torch.ones(3), 0), r"k=0 picks nothing.*type k="),
    (lambda: PlackettLuce(torch.ones(3), True), "k=True is no size"),
    (lambda: PlackettLuce(torch.ones(3), 1.5), "k=1.5 is no size"),
    (lambda: PlackettLuce(torch.ones(2, 3), torch.ones(3).long()), "is no size.*tensor of 2"),
    (lambda: PlackettLuce(torch.ones(3), 1, torch.ones(3)), r"mask is torch.float32 \[3\].*type mask.bool"),
    (lambda: PlackettLuce(torch.ones(3), 1, torch.ones(4).bool()), r"mask is torch.bool \[4\]"),
    (lambda: PlackettLuce(torch.ones(3), 1).sample(0), "samples=0 is no number.*samples=16"),
    (lambda: band_mask(torch.ones(3), 1, 0), "band=0 is no number of ranks.*band=32"),
    (lambda: PlackettLuce(torch.ones(3), 2).log_prob(torch.tensor([[0, 1]])), r"\[1, 2\], not int64.*mode\(\)"),
    (lambda: PlackettLuce(torch.ones(3), 2).log_prob(torch.tensor([[[0, 0]]])), r"picks\[0, 0\] = \[0, 0\]"),
    (lambda: PlackettLuce(torch.ones(3), 2).log_prob(torch.tensor([[[0, 3]]])), "2 different items of 0..2"),
    (lambda: ConditionalBernoulli(torch.ones(3), 2).log_prob(torch.tensor([[[0, -1]]])), "no subset of this law"),
    (lambda: PlackettLuce(torch.tensor([-torch.inf, 1, 1]), 1).log_prob(torch.tensor([[[0]]])), "masked nor -inf"),
    (lambda: ConditionalBernoulli(LOGITS, 2).kl(PlackettLuce(LOGITS, 2)), "not to a PlackettLuce"),
    (lambda: ConditionalBernoulli(LOGITS, 2).kl(ConditionalBernoulli(LOGITS, 3)), r"with k=\[3, 3\]"),
    (lambda: PlackettLuce(LOGITS, 1).kl(PlackettLuce(LOGITS.log(), 1, LOGITS > 0), None), "divergence is infinite"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_what_is_refused_and_what_the_error_says(call, says):
    with pytest.raises(InputError, match=says):
        call()
