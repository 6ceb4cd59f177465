"""Tensors on which authors' published code and ours are compared: the same on every machine and with every torch.

Numbers come from Python's own generator, which promises that a seed means the same numbers for ever. Read by
record.py, which asks the authors' code, and by tests/pruners/test_authors_choices.py, which asks ours.
"""

from __future__ import annotations

import math
import random
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["CASES", "Case", "numbers"]

Case: TypeAlias = dict[str, Any]
SIDE = 24
N = SIDE * SIDE  # CLIP's raster at 336 pixels, which HiPrune's and VScan's code is written for


def numbers(seed: str, *shape: int) -> Tensor:
    """Even numbers between -1 and 1."""
    draw = random.Random(seed).random
    return torch.tensor([2 * draw() - 1 for _ in range(math.prod(shape))]).view(*shape)


def attention(seed: str, *shape: int) -> Tensor:
    """Weights that sum to 1 over the last axis."""
    return (3 * numbers(seed, *shape)).softmax(dim=-1)


def hiprune(seed: int) -> Case:
    """`middle`, `deep`: [H, 1 + n, 1 + n], every query's attention in two blocks, CLS first."""
    found = {}
    for name in ("middle", "deep"):
        rows = numbers(f"{name} {seed}", 2, 1 + N)
        query = 1 + 0.3 * numbers(f"{name} queries {seed}", 2, 1 + N)
        found[name] = (rows[:, None] * query[:, :, None]).softmax(dim=-1)
    return found | {"keeps": [64, 75, 128, 192], "alpha": 0.1}


def sparsevlm(seed: int) -> Case:
    """`prompt` [a + n + t, d]: what enters the first layer; layers leave it as it is."""
    return {"ahead": 4, "n": 120, "text": 10, "prompt": 0.3 * numbers(f"prompt {seed}", 134, 160), "setting": 64}


def looks(seed: int, layer: int, length: int) -> Tensor:
    """[H, length, length] attention of a layer of the language model; causal."""
    raw = 3 * numbers(f"looks {seed} {layer}", 2, length, length)
    return raw.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=-1)


def pumer(seed: int) -> Case:
    """`attention` [H, t + n, t + n] and `keys` [t + n, d_h], text first, where it sees the image."""
    text, n = 8, 60
    shares = [(0.1, 0.3), (0.3, 0.5)][seed % 2]
    found = {"attention": attention(f"attention {seed}", 2, text + n, text + n), "shares": shares}
    return found | {"text": text, "n": n, "keys": numbers(f"keys {seed}", text + n, 16)}


def dart(seed: int) -> Case:
    """`hidden` [a + n + t, d], `keys` [H, a + n + t, d_h] and the `scale` [d] of a norm."""
    ahead, n, text = 5, 100, 12
    length = ahead + n + text
    found = {"hidden": numbers(f"hidden {seed}", length, 32), "keys": numbers(f"keys {seed}", 4, length, 8)}
    return found | {"ahead": ahead, "n": n, "text": text, "scale": 1 + 0.9 * numbers(f"scale {seed}", 32), "keep": 68}


def rms_norm(states: Tensor, scale: Tensor) -> Tensor:
    """Llama's norm."""
    return states * states.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * scale


def vscan(seed: int) -> Case:
    """`shallow`, `deep`: [H, n] attention of CLS in blocks 5 and -2; `rows` [n, d] after the projector."""
    blocks = {name: attention(f"{name} {seed}", 2, N) for name in ("shallow", "deep")}
    return blocks | {"rows": numbers(f"rows {seed}", N, 16), "keeps": [64, 97, 192]}


def mustdrop(seed: int) -> Case:
    """A prompt of which `always` are the image's tokens that the vision stage keeps; see `looks`."""
    always = sorted(random.Random(f"always {seed}").sample(range(60), 5))
    return {"ahead": 3, "n": 60, "text": 9, "always": always, "g": 0.019, "i": 0.045}


def vispruner(seed: int) -> Case:
    """`cls` [H, n] and `rows` [n, d] of the tower."""
    return {"cls": attention(f"cls {seed}", 2, 100), "rows": numbers(f"rows {seed}", 100, 16), "keeps": [8, 40, 64]}


def hired(seed: int) -> Case:
    """`first`, `last` [5, H, 144]: CLS attention of a thumbnail and four tiles in blocks 0 and 22."""
    blocks = {name: attention(f"{name} {seed}", 5, 2, 144) for name in ("first", "last")}
    return blocks | {"share": 0.25, "alpha": 0.5}


def otprune(seed: int) -> Case:
    """`rows` [n, d] after the projector."""
    return {"rows": numbers(f"rows {seed}", 144, 48), "keeps": [1, 16, 48, 100]}


def scope(seed: int) -> Case:
    """`cls` [H, n] and `rows` [n, d] of the tower."""
    found = {"cls": attention(f"cls {seed}", 2, 144), "rows": numbers(f"rows {seed}", 144, 16)}
    return found | {"keeps": [1, 16, 48, 100]}


def mmr(seed: int) -> Case:
    """`scores` [n] of a selector and `rows` [n, d] that the language model reads."""
    found = {"scores": numbers(f"scores {seed}", 144), "rows": numbers(f"rows {seed}", 144, 16)}
    return found | {"keeps": [1, 16, 48, 100], "balances": [0.5, 0.8]}


def holov(seed: int) -> Case:
    """`cls` [H, n] of the tower and `rows` [n, d] after the projector."""
    return {"cls": attention(f"cls {seed}", 2, N), "rows": numbers(f"rows {seed}", N, 16), "keeps": [64, 100, 192]}


def apet(seed: int) -> Case:
    """`rows` [n, d] of the tower, of numbers that float16 has; `start`: the longest."""
    rows = numbers(f"rows {seed}", N, 32).half().float()
    return {"rows": rows, "start": int(rows.norm(dim=1).argmax()), "basis": 10, "keeps": [32, 96, 192]}


def stages(seed: int) -> Case:
    """A prompt of LLaVA's, before which and behind which `states` says what its layers make of it."""
    return {"ahead": 35, "n": N, "text": 6}


def states(seed: int, layer: int, length: int) -> Tensor:
    """[length, d] hidden states that enter a layer of the language model."""
    return numbers(f"states {seed} {layer}", length, 8)


def last_looks(seed: int, layer: int, length: int) -> Tensor:
    """[H, length] attention of the last token in a layer."""
    return attention(f"last {seed} {layer}", 2, length)


def priortr(seed: int) -> Case:
    """`attention` [H, a + n + t, a + n + t], causal."""
    ahead, n, text = 5, 100, 9
    return {"ahead": ahead, "n": n, "text": text, "attention": looks(seed, 2, ahead + n + text), "keeps": [8, 40, 64]}


def picture(seed: int, channels: int) -> Tensor:
    """[n, d] rows of which neighbours are alike."""
    field = numbers(f"field {seed}", channels, 7, 7)
    smooth = torch.nn.functional.interpolate(field[None], (SIDE, SIDE), mode="bilinear", align_corners=True)[0]
    return smooth.flatten(1).T + 0.3 * numbers(f"noise {seed}", N, channels)


def prunesid(seed: int) -> Case:
    """`rows` [n, d] after the projector."""
    return {"rows": picture(seed, 64), "keeps": [32, 64, 192]}


def restore(seed: int) -> Case:
    """`rows` [n, d] after the projector, and how many of them are kept without merging."""
    rows = picture(seed, 32)[: 24 * 9]
    kept = sorted(random.Random(f"kept {seed}").sample(range(len(rows)), 24))
    return {"rows": rows, "kept": kept, "keep": 2 * len(kept)}


def vlm_pruner(seed: int) -> Case:
    """A prompt of LLaVA's: `hidden` [a + n, d] and `keys` [H, a + n, d_h]."""
    ahead = 5
    hidden = torch.cat((numbers(f"ahead {seed}", ahead, 320), picture(seed, 320)))
    keys = numbers(f"keys {seed}", 2, ahead + N, 8)
    return {"ahead": ahead, "n": N, "hidden": hidden, "keys": keys, "keeps": [32, 64, 192]}


def ivc_prune(seed: int) -> Case:
    """A prompt of Qwen's: `values` [H, L, d_h], `cos` and `sin` [3, L, d_h]; two special tokens end the image."""
    ahead, n, ends, text = 5, 100, 2, 9
    length = ahead + n + ends + text
    found = {name: numbers(f"{name} {seed}", 3, length, 8) for name in ("cos", "sin")}
    found |= {"values": 1.5 * numbers(f"values {seed}", 2, length, 8)}
    return found | {"ahead": ahead, "n": n, "ends": ends, "text": text}


def hawk(seed: int) -> Case:
    """`queries` [H, t, d_h] and `keys` [key heads, n, d_h] of the first layer, and `weights` [H]."""
    found = {"queries": numbers(f"queries {seed}", 4, 9, 8), "keys": numbers(f"keys {seed}", 2, 100, 8)}
    return found | {"weights": numbers(f"weights {seed}", 4).abs(), "keeps": [1, 8, 40, 64]}


CASES = {
    "hiprune": hiprune,
    "sparsevlm": sparsevlm,
    "pumer": pumer,
    "dart": dart,
    "vscan_vision": vscan,
    "mustdrop_llm": mustdrop,
    "vispruner": vispruner,
    "hired": hired,
    "otprune": otprune,
    "scope": scope,
    "mmr": mmr,
    "holov": holov,
    "prunesid": prunesid,
    "apet_input": apet,
    "clse": stages,
    "v2drop": stages,
    "restore": restore,
    "priortr": priortr,
    "vlm_pruner": vlm_pruner,
    "ivc_prune": ivc_prune,
    "hawk": hawk,
}
