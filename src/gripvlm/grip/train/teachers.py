"""Teachers of the warm-up: what a scorer imitates before it explores.

Each returns, for every image of a batch, a distribution over its tokens [n] that sums to 1 (or a set, as a
uniform distribution over it), from the frozen model's run on the *full* input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gripvlm.errors import TrainError
from gripvlm.grip.train.masking import masked_forward
from gripvlm.grip.train.rewards import log_prob
from gripvlm.grip.train.rollout import Batch, Engine
from gripvlm.models.hooks.attention import capture_attention
from gripvlm.pruners import Pruner, get_pruner

__all__ = ["TEACHERS", "Teacher", "make_teacher"]

Teacher = Callable[[Engine, Batch, Tensor, torch.Generator], list[Tensor]]
"""(engine, batch, kept [I], random numbers) -> a distribution [n] for each of the batch's I images."""

TEACHERS = ("attention", "gradient", "best_of_n", "pruner:NAME")


def make_teacher(name: str, layers: Sequence[int] = (), tries: int = 16) -> Teacher:
    """A teacher by name.

    Args:
        name: `attention` (text-to-visual attention of `layers`), `gradient` (of the answer's log-probability
            with respect to a gate on each token), `best_of_n` (the best of `tries` random subsets), or
            `pruner:NAME` (the choice of any pruner in the registry).
        layers: for `attention`; by default the second half of the language model.

    Raises:
        TrainError: none of these.
    """
    if name == "attention":
        return _Attention(tuple(layers))
    if name == "gradient":
        return _gradient
    if name == "best_of_n":
        return _BestOfN(tries)
    kind, _, rest = name.partition(":")
    if kind == "pruner" and rest:
        pruner = get_pruner(rest)
        if pruner.stage != "input" or not pruner.needs <= {"features", "grid", "question", "key"}:
            raise TrainError(f"{name!r} looks inside the model, which this teacher cannot: type another pruner")
        return _Imitate(pruner)
    raise TrainError(f"unknown teacher {name!r}: type one of {', '.join(TEACHERS)}")


@dataclass(frozen=True)
class _Attention:
    """Head-mean attention that the rows which predict the answer pay to each visual token, mean over layers.

    TwigVLM++ (arXiv 2503.14075) distils one designated deep layer; the mean over several needs no choice of one.
    """

    layers: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, engine: Engine, batch: Batch, kept: Tensor, random: torch.Generator) -> list[Tensor]:
        model = engine.model
        count = model.config.get_text_config().num_hidden_layers
        layers = self.layers or tuple(range(count // 2, count))
        width = batch.longest
        queries = list(range(-width - 1, -1))
        arguments = engine.whole(batch)
        with capture_attention(model.get_decoder(), layers, queries) as seen:
            model(**arguments, use_cache=False)
        rows = torch.stack([seen[layer % count][0].mean(1) for layer in layers]).mean(0)  # [B, T, L]
        predicts = (batch.inputs["labels"][:, -width:] >= 0).to(rows)
        looks = (rows * predicts[..., None]).sum(1)
        found = [looks[i, positions] for i, positions in engine.places(batch)]
        return [look / look.sum().clamp(min=1e-9) for look in found]


def _gradient(engine: Engine, batch: Batch, kept: Tensor, random: torch.Generator) -> list[Tensor]:
    """What the answer's mean log-probability would lose first if a token's attention were turned down.

    The gate is a factor on the token's attention weights, not on its features: a scaled feature passes the
    first normalisation unchanged.
    """
    gates = [torch.zeros(t.n, device=t.features.device, requires_grad=True) for m in batch.tokens for t in m]
    log_probs = masked_forward(engine, batch, gates)
    (log_probs.sum(-1) / batch.lengths).sum().backward()
    found = [gate.grad.clamp(min=0) for gate in gates if gate.grad is not None]
    return [(g + 1e-6 * g.mean() + 1e-12) / (g + 1e-6 * g.mean() + 1e-12).sum() for g in found]


@dataclass(frozen=True)
class _BestOfN:
    """The best of N subsets, half of them random, half drawn around the attention teacher."""

    tries: int

    @torch.no_grad()
    def __call__(self, engine: Engine, batch: Batch, kept: Tensor, random: torch.Generator) -> list[Tensor]:
        looks = _Attention(())(engine, batch, kept, random)
        owner = [i for i, tokens in enumerate(batch.tokens) for _ in tokens]
        rows: list[int] = []
        subsets: list[list[Tensor]] = []
        for sample in range(len(batch)):
            mine = [j for j, o in enumerate(owner) if o == sample]
            for attempt in range(self.tries):
                picks = []
                for j in mine:
                    noise = -torch.empty(looks[j].shape).exponential_(generator=random).log().to(looks[j].device)
                    score = noise + (looks[j].clamp(min=1e-9).log() if attempt % 2 else 0.0)
                    picks.append(score.topk(int(kept[j])).indices.sort().values)
                rows.append(sample)
                subsets.append(picks)
        rollout = engine.run(batch, rows, subsets, logits=False)
        best = log_prob(rollout).view(len(batch), self.tries).argmax(-1).tolist()
        out: list[Tensor] = []
        for sample in range(len(batch)):
            for picks in subsets[sample * self.tries + best[sample]]:
                look = torch.zeros(len(looks[len(out)]), device=picks.device)
                look[picks] = 1 / len(picks)
                out.append(look)
        return out


@dataclass(frozen=True)
class _Imitate:
    """Any pruner's set, each of its tokens alike."""

    pruner: Pruner

    @torch.no_grad()
    def __call__(self, engine: Engine, batch: Batch, kept: Tensor, random: torch.Generator) -> list[Tensor]:
        images = [tokens for mine in batch.tokens for tokens in mine]
        out = []
        for tokens, k in zip(images, kept.tolist(), strict=True):
            look = torch.zeros(tokens.n, device=tokens.features.device)
            look[self.pruner.select(replace(tokens, keep=k)).indices] = 1 / k
            out.append(look)
        return out
