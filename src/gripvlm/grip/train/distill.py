"""Stage 1: the scorer imitates a teacher on the full input (the paper's supervised warm-up), and the teachers.

A teacher returns, for every image of a batch, weights of its tokens [n], 0 or more (or a set, as a uniform weight of
its tokens), -1 for tokens that it says nothing about. The images of a question are on one scale: what the scorer
imitates is a distribution over each image's tokens, or over all tokens of a question where its budget is joint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import UnsupportedModelError
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.batch import Batch
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import draw_counts, draw_tower_counts
from gripvlm.grip.train.rewards import by_name
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.stage import Stage, Stats
from gripvlm.models.families import chunkable, family_of
from gripvlm.models.hooks.attention import capture_attention, modules_of
from gripvlm.models.hooks.calls import AttentionCall, call_hooks
from gripvlm.models.hooks.llm_drop import checked_keys

Teacher: TypeAlias = Callable[[Engine, Batch, Tensor, torch.Generator], list[Tensor]]
"""(engine, batch, counts [I], random numbers) -> weights [n] for each of the batch's I images."""

FLOOR = 0.05
"""The share of its attention that a token has in `missing` while it is not kept. At 0 there would be no slope, and near
0 the answer's change is steepest at first and soon over: the slope says little about the token's arrival."""

LOWEST = -1e4
"""The least bias on a score: its exponential is 0."""


class Distill(Stage):
    """Loss: KL(teacher || softmax of the logits), mean over images, at budgets drawn as in GRPO.

    TwigVLM++ (arXiv 2503.14075) distils attention so. Most teachers see the full input and do not depend on the budget;
    the scorer sees one nevertheless, so that its ranking is good at all of them when exploration starts.

    What tokens lose by being like kept ones has no part in it. Targets of what is missing in sets that the scorer draws
    itself would train that too: on lab-dense the scorer was no better (experiments/grip_claim).
    """

    name = "distill"
    random_stream: ClassVar[str] = "warmup"  # the stage's former name: published runs drew their budgets from it
    rate_setting: ClassVar[str] = "distill_learning_rate"

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine, config.distill_steps, config.distill_learning_rate)
        self.teacher = get_teacher(config.teacher)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        scorer = self.scorer
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        owner = torch.tensor(batch.owner, device=batch.sizes.device)
        counts = draw_counts(self.config, batch.sizes, owner, random)
        weights = self.teacher(self.engine, batch, counts, random)
        logits = inputs.score(scorer, inputs.totals(counts))
        kl = _divergence(_rows(weights, inputs), logits, inputs.valid)
        # The mean over questions, however many sequences each has.
        loss = (kl / torch.bincount(inputs.owner)[inputs.owner]).sum() / len(batch)
        stats = {"kl_teacher": float(loss.detach())}
        if scorer.config.tower_features:
            # The same weights: what the answer needs behind the projector it needs inside the tower.
            inside = batch.for_tower_stage(scorer.config.question)
            kept = draw_tower_counts(self.config, batch.sizes, counts, random)
            kl = _divergence(_rows(weights, inside), inside.score(scorer.tower, kept), inside.valid)
            stats["kl_teacher_tower"] = float(kl.detach().mean())
            loss = loss + kl.mean()
        yield loss, stats


def _rows(weights: Sequence[Tensor], inputs: ScorerInputs) -> Tensor:
    """[S, n] weights of each sequence's tokens from those [n_i] of its images, -1 at padding."""
    images = iter(weights)
    rows = [torch.cat([next(images) for _ in sizes]) for sizes in inputs.parts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1.0)


def _divergence(weights: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    """[S] KL(weights, made a distribution || softmax of the logits), over the tokens whose weight is not negative."""
    asked = valid & (weights >= 0)
    targets = weights * asked
    targets = targets / targets.sum(-1, keepdim=True).clamp(min=1e-20)
    # -inf where nothing is asked, and the target is 0: the product would be NaN.
    log_probs = logits.masked_fill(~asked, -torch.inf).log_softmax(-1).masked_fill(~asked, 0.0)
    # A constant for the scorer; with it the loss is 0 for a perfect imitation.
    entropy = -(targets * targets.clamp(min=1e-12).log()).sum(-1)
    return -(targets * log_probs).sum(-1) - entropy


# --- teachers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention(engine: Engine, batch: Batch, counts: Tensor, random: torch.Generator) -> list[Tensor]:
    """Attention that the rows which predict the answer pay to each visual token, mean over heads and deep layers.

    TwigVLM++ (arXiv 2503.14075) distils one designated deep layer; the mean over the second half needs no choice.
    """
    return _in_parts(engine, batch, _attention)


def _attention(engine: Engine, batch: Batch, rows: Sequence[int]) -> list[Tensor]:
    model = engine.model
    depth = model.config.get_text_config().num_hidden_layers
    layers = tuple(range(depth // 2, depth))
    width = batch.longest
    queries = list(range(-width - 1, -1))  # the row before each answer token predicts it
    arguments = engine.whole(batch)
    with capture_attention(model.get_decoder(), layers, queries) as seen:
        model(**arguments, **engine.last(1), use_cache=False)
    paid = torch.stack([seen[layer][0].mean(1) for layer in layers]).mean(0)  # [B, T, L]
    predicts = (batch.inputs["labels"][:, -width:] >= 0).to(paid)
    weights = (paid * predicts[..., None]).sum(1)
    return [weights[i, positions] for i, positions in engine.image_positions(batch)]


def gradient(engine: Engine, batch: Batch, counts: Tensor, random: torch.Generator) -> list[Tensor]:
    """What the answer's mean log-probability would lose first if a token's attention were turned down.

    The gate is a factor on the token's attention weights, not on its features: a scaled feature passes the
    first normalisation unchanged.
    """
    return _in_parts(engine, batch, _gradient)


def _gradient(engine: Engine, batch: Batch, rows: Sequence[int]) -> list[Tensor]:
    gates = [torch.zeros(t.n, device=t.features.device, requires_grad=True) for m in batch.tokens for t in m]
    return _slopes(engine, batch, gates)


def _slopes(engine: Engine, batch: Batch, biases: Sequence[Tensor]) -> list[Tensor]:
    """[n] for each bias: by how much the answer's mean log-probability rises with it, a little more than 0 at least."""
    log_probs = masked_forward(engine, batch, biases)
    gradients = torch.autograd.grad((log_probs.sum(-1) / batch.answer_lengths).sum(), biases)
    slopes = [gradient.clamp(min=0) for gradient in gradients]
    return [slope + 1e-6 * slope.mean() + 1e-12 for slope in slopes]  # no token has a weight of 0


def gradient_at_k(engine: Engine, batch: Batch, counts: Tensor, random: torch.Generator) -> list[Tensor]:
    """What is missing in a random set of k - 1 tokens of each image.

    One forward and one backward pass a step as `gradient`; the scorer, which sees k, learns the mean over the sets.
    """
    kept = []
    for n, k in zip(batch.sizes.tolist(), counts.tolist(), strict=True):
        order = torch.randperm(n, generator=random).to(counts.device)
        kept.append(order < k - 1)  # the ranks of a permutation are one too
    return missing(engine, batch, kept)


def missing(engine: Engine, batch: Batch, kept: Sequence[Tensor]) -> list[Tensor]:
    """What the answer's mean log-probability would gain first if a token came to those that are kept.

    The tokens that are not have `FLOOR` of their attention, all the same, so that their slopes compare.

    Args:
        kept: [n] bool for each image.

    Returns:
        [n] weights for each image, -1 for what is kept.
    """
    mine = batch.by_question(kept)

    def look(engine: Engine, part: Batch, rows: Sequence[int]) -> list[Tensor]:
        return _missing(engine, part, [image for row in rows for image in mine[row]])

    return _in_parts(engine, batch, look)


def _missing(engine: Engine, batch: Batch, kept: Sequence[Tensor]) -> list[Tensor]:
    biases = [torch.where(mine, 0.0, math.log(FLOOR)).requires_grad_() for mine in kept]
    slopes = _slopes(engine, batch, biases)
    return [slope.masked_fill(mine, -1.0) for mine, slope in zip(kept, slopes, strict=True)]


def _in_parts(
    engine: Engine, batch: Batch, look: Callable[[Engine, Batch, Sequence[int]], list[Tensor]]
) -> list[Tensor]:
    """What `look` gives for every image of the batch, from forwards of `max_tokens_per_forward` tokens at most.

    Args:
        look: (engine, some questions as a batch, which of the batch they are).
    """
    found: dict[int, list[Tensor]] = {}
    for part in engine.parts(batch, range(len(batch)), batch.everything):
        each = batch.take(part)
        for row, images in zip(part, each.by_question(look(engine, each, part)), strict=True):
            found[row] = images
    return [image for row in range(len(batch)) for image in found[row]]


TEACHERS: dict[str, Teacher] = {"gradient": gradient, "gradient_at_k": gradient_at_k, "attention": attention}


def get_teacher(name: str) -> Teacher:
    """A teacher by name, or by `module:function`.

    Raises:
        TrainError: neither.
    """
    teacher: Teacher = by_name("teacher", name, TEACHERS)
    return teacher


# --- soft masks on attention --------------------------------------------------------------------------------------


def masked_forward(engine: Engine, batch: Batch, biases: Sequence[Tensor]) -> Tensor:
    """Log-probabilities [B, T] of the forced answers, differentiable in the biases; 0 at padding.

    `log(m)` added to the scores of a visual token multiplies its attention weights by m before normalisation, as
    DynamicViT (arXiv 2106.02034, eq. 11) does: at m in {0, 1} it is exactly dropping or keeping, and unlike scaling the
    feature it cannot be undone by a normalisation layer. Departure: a token's weight in its own row is multiplied too,
    where DynamicViT leaves it at 1. Rows of a token with m = 0 are not used.

    Args:
        biases: one [n] for each image of the batch, in order: log of the share of attention it keeps.

    Raises:
        UnsupportedModelError: an attention implementation or a layer that takes no bias key by key, sliding windows, or
            a model whose images attend in both directions.
    """
    model = engine.model
    text = model.get_decoder().config
    checked_keys(model, "soft masks need attention with a bias on each key")
    advice = "train with stage grpo, and with a teacher other than gradient"
    if getattr(text, "sliding_window", None):
        raise UnsupportedModelError(f"soft masks do not know sliding windows, which {text.model_type} has: {advice}")
    if not chunkable(family_of(model), model):
        raise UnsupportedModelError(
            f"soft masks are causal, and {model.config.model_type} images attend in both directions: {advice}"
        )
    # Dropping needs no gradient; only the forward below does.
    with torch.no_grad():
        arguments = engine.whole(batch)
    mask = arguments["attention_mask"]
    places = engine.image_positions(batch)
    row = torch.cat([torch.full_like(positions, i) for i, positions in places])
    column = torch.cat([positions for _, positions in places])
    # LOWEST: of a mask of 0, whose logarithm would make products of 0 and infinity.
    values = torch.cat([bias.float() for bias in biases]).clamp(min=LOWEST)
    key_bias = torch.zeros(mask.shape, device=mask.device).index_put((row, column), values)
    layers = modules_of(model.get_decoder())
    seen: set[int] = set()

    def add(layer: int, call: AttentionCall) -> None:
        seen.add(layer)
        call.key_bias = key_bias.to(call.key.device)

    def biased() -> AbstractContextManager[None]:
        return call_hooks(attention={module: partial(add, layer) for module, layer in layers.items()})

    found = engine.forced_log_probs(batch, arguments, biased)
    if unseen := sorted({*layers.values()} - seen):
        raise UnsupportedModelError(
            f"layer {unseen[0]} of {text.model_type} does not attend through transformers' attention functions: "
            f"{advice}"
        )
    return found
