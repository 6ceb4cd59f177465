"""Teachers other than the package's, for `gripvlm train --teacher MODULE:NAME`.

python -m gripvlm train distill --teacher experiments.grip_ablation.teachers:best_of_16 ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gripvlm.grip.train import Batch, Engine
from gripvlm.grip.train.distill import Teacher, attention
from gripvlm.grip.train.rewards import log_prob
from gripvlm.pruners import Pruner, get_pruner


def best_of(tries: int) -> Teacher:
    """The best of `tries` subsets, half of them random, half drawn around the attention teacher."""

    @torch.no_grad()
    def teacher(engine: Engine, batch: Batch, counts: Tensor, random: torch.Generator) -> list[Tensor]:
        weights = attention(engine, batch, counts, random)
        owner = [i for i, tokens in enumerate(batch.tokens) for _ in tokens]
        rows: list[int] = []
        subsets: list[list[Tensor]] = []
        for sample in range(len(batch)):
            images = [image for image, of in enumerate(owner) if of == sample]
            for attempt in range(tries):
                around = attempt % 2 == 1
                subsets.append([_draw(weights[i], int(counts[i]), around, random) for i in images])
                rows.append(sample)
        rollout = engine.run(batch, rows, subsets, logits=False)
        best = log_prob(rollout).view(len(batch), tries).argmax(-1).tolist()
        winners = [subset for sample, i in enumerate(best) for subset in subsets[sample * tries + i]]
        return [_uniform_over(chosen, len(all_)) for chosen, all_ in zip(winners, weights, strict=True)]

    return teacher


def search(tries: int, rounds: int = 4) -> Teacher:
    """The best subset that an evolutionary search finds with `tries` forwards, in rounds of as many each.

    As EvoComp (arXiv 2604.17087) labels its tokens, by the subset with the answer's least loss. Ours has no published
    code to follow: the first round draws around the attention teacher, each later one changes a quarter of the best
    set's tokens, at least one, for others that are drawn around the attention too.

    The subset is found by knowing the answer, and so may be one that gives the answer away.
    """
    each = tries // rounds

    @torch.no_grad()
    def teacher(engine: Engine, batch: Batch, counts: Tensor, random: torch.Generator) -> list[Tensor]:
        weights = attention(engine, batch, counts, random)
        images = batch.by_question(torch.arange(len(weights)))
        rows = [sample for sample in range(len(batch)) for _ in range(each)]
        best: list[tuple[float, list[Tensor]]] = [(-torch.inf, [])] * len(batch)
        for _ in range(rounds):
            subsets = []
            for sample in rows:
                of = images[sample]
                if best[sample][1]:
                    pairs = zip(of, best[sample][1], strict=True)
                    subsets.append([_changed(weights[i], chosen, random) for i, chosen in pairs])
                else:
                    subsets.append([_draw(weights[i], int(counts[i]), True, random) for i in of])
            values = log_prob(engine.run(batch, rows, subsets, logits=False)).tolist()
            for sample, value, subset in zip(rows, values, subsets, strict=True):
                if value > best[sample][0]:
                    best[sample] = value, subset
        winners = [chosen for _, subset in best for chosen in subset]
        return [_uniform_over(chosen, len(all_)) for chosen, all_ in zip(winners, weights, strict=True)]

    return teacher


def imitate(pruner: Pruner | str) -> Teacher:
    """The subset of a pruner that reads features, grid, question and key; each of its tokens alike."""
    chosen_by = get_pruner(pruner)

    @torch.no_grad()
    def teacher(engine: Engine, batch: Batch, counts: Tensor, random: torch.Generator) -> list[Tensor]:
        images = [tokens for sample in batch.tokens for tokens in sample]
        return [
            _uniform_over(chosen_by.select(replace(tokens, keep=k)).indices, tokens.n)
            for tokens, k in zip(images, counts.tolist(), strict=True)
        ]

    return teacher


best_of_16: Callable[..., list[Tensor]] = best_of(16)
search_16: Callable[..., list[Tensor]] = search(16)


def _draw(attention: Tensor, count: int, around: bool, random: torch.Generator) -> Tensor:
    """[count] indices, ascending: a random subset, or one drawn around the attention [n]."""
    # Gumbel noise: the top k of log-weights with it are a sample without replacement.
    noise = -torch.empty(attention.shape).exponential_(generator=random).log().to(attention.device)
    score = noise + (attention.clamp(min=1e-9).log() if around else 0.0)
    return score.topk(count).indices.sort().values


def _changed(attention: Tensor, chosen: Tensor, random: torch.Generator) -> Tensor:
    """Indices as many as `chosen`, ascending: a quarter of them, at least one, changed for others where there are."""
    others = len(attention) - len(chosen)
    swaps = min(max(1, len(chosen) // 4), others)
    if not swaps:
        return chosen
    stay = chosen[torch.randperm(len(chosen), generator=random)[swaps:].to(chosen.device)]
    free = torch.ones(len(attention), dtype=torch.bool, device=attention.device).index_fill(0, chosen, False)
    free = free.nonzero().flatten()
    return torch.cat((stay, free[_draw(attention[free], swaps, True, random)])).sort().values


def _uniform_over(indices: Tensor, n: int) -> Tensor:
    """[n] the uniform distribution over some of n tokens."""
    return torch.zeros(n, device=indices.device).index_fill(0, indices, 1 / len(indices))
