"""Gradients through a soft mask inside a frozen language model, with the attention kernels of a GPU.

There a kernel keeps what its backward needs only where it is told to, which no kernel of a CPU shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gripvlm.grip.train import Engine
from gripvlm.grip.train.distill import masked_forward
from on_device import cut
from tiny_train import asked, processor_of, tiny_vlm


def gradients(engine: Engine, attention: str) -> tuple[Tensor, Tensor]:
    """(log-probabilities [B, T], their sum's gradient by the bias on every visual token), both float32."""
    engine.model.set_attn_implementation(attention)
    task = asked(pictures=1, each=2)
    batch = engine.prepare([(task, sample) for sample in task.samples])
    random = torch.Generator().manual_seed(0)
    biases = [
        torch.randn(t.n, generator=random).to(t.features.device).requires_grad_() for mine in batch.tokens for t in mine
    ]
    found = masked_forward(engine, batch, biases)
    found.sum().backward()
    assert not any(t.features.requires_grad for mine in batch.tokens for t in mine)
    return found.detach(), torch.cat([bias.grad for bias in biases])


@pytest.mark.parametrize(
    ("device", "name", "dtype", "close"),
    [
        ("cpu", "tiny", torch.float32, 1e-4),
        ("cpu", "tiny", torch.bfloat16, 0.2),
        pytest.param("cuda", "llava-1.5-7b", torch.bfloat16, 0.1, marks=pytest.mark.gpu),
    ],
)
def test_backward_through_a_soft_mask(device, name, dtype, close, record_property):
    """As with eager attention, which is plain arithmetic."""
    if name == "tiny":
        model, processor = tiny_vlm()
        model.to(dtype)
    else:
        model, _ = cut(name, device, dtype)
        processor = processor_of(model)
    engine = Engine(model, processor)
    (found, mine), (expected, plain) = gradients(engine, "sdpa"), gradients(engine, "eager")
    off = float((mine - plain).norm() / plain.norm())
    record_property("gradient, difference from eager attention as a share of its length", off)
    assert float(plain.norm()) > 0
    assert off <= close
    assert float((found - expected).abs().max()) <= close * float(expected.abs().max())
