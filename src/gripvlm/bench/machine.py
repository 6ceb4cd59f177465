"""What the hardware can do: matrix rate and copy bandwidth, measured in the same run as everything else; FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gripvlm.utils.timing import device_time

__all__ = ["Machine", "Weights", "flop_counter", "measured"]


@dataclass(frozen=True)
class Machine:
    """The two numbers of a roofline.

    Attributes:
        flops: a second, of the fastest of several products of two square matrices in the model's dtype.
        bandwidth: bytes a second, read and written together, of the fastest of several copies.
        side: of the matrices.
        copied: bytes that each copy reads.
    """

    flops: float
    bandwidth: float
    side: int
    copied: int

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs and bytes: max(flops / rate, bytes / bandwidth), Williams et al. 2009."""
        return max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that a pass reads: the language model's layers and output head, and all that is not text."""

    language: int
    vision: int

    @classmethod
    def of(cls, model: Any) -> Weights:
        """Looking up embeddings reads a few rows only, so that table counts where it is the output head as well."""
        parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
        head = {id(p) for p in parts[1].parameters()} if len(parts) > 1 else set()
        table = {id(p) for p in model.get_input_embeddings().parameters()}
        text = {id(p): p.nbytes for part in parts for p in part.parameters() if id(p) not in table or id(p) in head}
        rest = [p.nbytes for p in model.parameters() if id(p) not in text and id(p) not in table]
        return cls(sum(text.values()), sum(rest))


def measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Machine:
    """The machine's rates, each from repeats over about `seconds`."""
    large = device.type != "cpu"
    side, count = (8192, 2**28) if large else (768, 2**25)
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(a, a, out=out), device, seconds)
    copy = _fastest(lambda: target.copy_(source), device, seconds)
    return Machine(2 * side**3 / product, 2 * count / copy, side, count)


def _fastest(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    work()
    best, ends = float("inf"), device_time(device) + seconds
    while (began := device_time(device)) < ends:
        work()
        best = min(best, device_time(device) - began)
    return best


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """2 x B x H x Lq x Lk x (d + dv): both products of attention, the masked half of a causal one included."""
    batch, heads, asked, width = query
    return int(2 * batch * heads * asked * key[-2] * (width + value[-1]))


def flop_counter() -> FlopCounterMode:
    """torch's FlopCounterMode, with attention counted on a CPU too, and where heads share keys.

    It counts matrix products, convolutions and attention, two for a multiply-add; not sorts, norms and the like.
    """
    names = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    found = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in names]
    return FlopCounterMode(display=False, custom_mapping={one: _attention for one in found if one is not None})
