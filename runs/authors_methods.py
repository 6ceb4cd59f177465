"""Five pruners after their papers' descriptions, in the way that their authors' public code is known to work.

Written for runs/authors_way.py, which times them against gripvlm's. It is not the authors' code, and none of it was
copied: what is kept is what that code asks of the machine, such as whole attention matrices, a loop over tokens or one
image at a time. So that both ways can be held to the same tokens, these depart from the authors' code where gripvlm's
pruners do, and further in what is numbered below.

All return the kept rows of each image, [k] ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["Prefill", "cdpruner", "divprune", "fastv", "known", "prefill", "recycled", "sparsevlm", "visionzip"]

Cut: TypeAlias = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(attention [H, l, l] of the layer before or, where that attends by sdpa, None; hidden [l, d]; places [m] of visual
tokens) -> kept [k] of the m, their states [k, d]."""


# --- pruners at the input ---------------------------------------------------------------------------


def divprune(features: Tensor, keep: int) -> Tensor:
    """DivPrune (arXiv 2503.02175): [k] of one image's rows [n, d].

    The whole distance matrix, then at each step the rows of all tokens chosen so far are taken out of it and their
    minimum is formed anew: O(k^2 n). The first token is the one whose second smallest distance, after that to
    itself, is the largest.

    1. Float32, where the code runs in the model's dtype.
    """
    rows = normalize(features.float(), dim=-1)
    distance = 1 - rows @ rows.T
    chosen = torch.empty(keep, dtype=torch.long, device=rows.device)
    for step in range(keep):
        if step:
            nearest = distance.index_select(0, chosen[:step]).amin(dim=0)
            nearest[chosen[:step]] = -torch.inf
        else:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        chosen[step] = nearest.argmax()
    return chosen.sort().values


def cdpruner(features: Tensor, questions: Tensor, keep: int) -> Tensor:
    """CDPruner (arXiv 2506.10967): [B, k] of the rows [B, n, d] of B images, with question embeddings [B, t, d].

    The kernel L = diag(r) C diag(r), then greedy MAP with one row of L's Cholesky factor a step, all images at once.

    1. Relevance from question embeddings, min and max over each image: as gripvlm's without a CLIP text tower.
    """
    rows = normalize(features.float(), dim=-1)
    relevance = (rows @ normalize(questions.float(), dim=-1).mT).mean(dim=-1)
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    relevance = (relevance - low) / (high - low) + 1e-6
    kernel = relevance[:, :, None] * (rows @ rows.mT) * relevance[:, None]
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    every = torch.arange(len(rows), device=rows.device)
    factor = rows.new_zeros(keep, *gain.shape)
    chosen = torch.empty(keep, len(rows), dtype=torch.long, device=rows.device)
    for step in range(keep):
        pick = gain.argmax(dim=1)
        known = torch.einsum("sb,sbn->bn", factor[:step, every, pick], factor[:step])
        factor[step] = (kernel[every, pick] - known) / gain[every, pick].sqrt()[:, None]
        gain = gain - factor[step].square()
        gain[every, pick] = -torch.inf
        chosen[step] = pick
    return chosen.T.sort(dim=1).values


# --- in the vision tower ----------------------------------------------------------------------------


@contextmanager
def _attending(config: Any, how: str) -> Iterator[None]:
    """Inside the block, modules that read this config attend so."""
    before = config._attn_implementation
    config._attn_implementation = how
    try:
        yield
    finally:
        config._attn_implementation = before


def visionzip(model: Any, pixels: Tensor, dominant: int, contextual: int) -> tuple[list[Tensor], Tensor]:
    """VisionZip (arXiv 2412.04467): kept rows of each image, and what the projector makes of them, [B, k, d].

    The tower attends eagerly and returns the attention matrices and states of all its blocks. Of those of the last
    but one block the CLS token's row is read; keys are that block's key projection, the mean over heads.
    Contextual tokens are merged before the projector, which sees k rows instead of n.

    1. The CLS token is not among the dominant ones, and a contextual token stands where its target stood.
    2. A target with nothing to absorb stays as it is.
    """
    tower = model.get_encoder("image")
    keys: list[Tensor] = []
    attend = next(module for name, module in tower.named_modules() if name.endswith(f"layers.{_last(tower)}.self_attn"))
    handle = attend.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    try:
        with _attending(attend.config, "eager"):
            seen = tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        handle.remove()
    states = seen.hidden_states[-2][:, 1:]  # [B, n, d]
    scores = seen.attentions[-2][:, :, 0, 1:].sum(dim=1)  # [B, n]
    metric = normalize(keys[0].unflatten(-1, (attend.num_heads, -1)).mean(dim=2)[:, 1:], dim=-1)
    kept, rows = [], []
    for score, state, key in zip(scores, states, metric, strict=True):
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask[score.topk(dominant).indices] = True
        rest = (~mask).nonzero().flatten()
        places = torch.arange(contextual, device=rest.device) * (rest.numel() // max(1, contextual))
        others = torch.ones_like(rest, dtype=torch.bool)
        others[places] = False
        if contextual:
            nearest = (key[rest[others]] @ key[rest[places]].T).argmax(dim=1)
            one_hot = torch.nn.functional.one_hot(nearest, contextual).to(state.dtype)  # [m - C, C]
            mean = one_hot.T @ state[rest[others]] / one_hot.sum(dim=0).clamp(min=1)[:, None]
            state = state.index_add(0, rest[places], mean)
            mask[rest[places]] = True
        kept.append(mask.nonzero().flatten())
        rows.append(state[kept[-1]])
    return kept, model.base_model.multi_modal_projector(torch.stack(rows))


def _last(tower: Any) -> int:
    """The number of the last block but one."""
    return int(tower.config.num_hidden_layers) - 2


# --- in the language model --------------------------------------------------------------------------


class Prefill(NamedTuple):
    """What a prompt came to: the rows left after each cut, and logits [1, vocabulary] of the last token."""

    rows: list[Tensor]
    logits: Tensor


def prefill(
    model: Any,
    ids: Tensor,
    features: Tensor,
    cuts: Mapping[int, Cut],
    eager: Collection[int],
    reached: Callable[[], None],
) -> Prefill:
    """A prompt [1, L] with one picture, its rows [n, d] in one stretch, layer by layer; with a cache.

    Layers in `eager` attend eagerly, the others by sdpa. Before each layer in `cuts` the states of the visual tokens
    that are kept are put between those of the text before and after. `reached` is called after the last cut.

    1. Tokens keep their positions, as gripvlm's do; of these authors only FastV's do.
    """
    from transformers import DynamicCache

    decoder = model.get_decoder()
    visual = ids[0] == model.config.image_token_id
    hidden = model.get_input_embeddings()(ids).masked_scatter(visual[None, :, None], features)
    places, start = torch.arange(ids.shape[1], device=ids.device)[None], int(visual.int().argmax())
    rows = torch.arange(features.shape[0], device=ids.device)
    cache, left, noted = DynamicCache(config=decoder.config), [], {}

    def note(number: int) -> Callable[..., None]:
        return lambda module, args, output: noted.update({number: None if output[1] is None else output[1][0]})

    handles = [decoder.layers[cut - 1].self_attn.register_forward_hook(note(cut)) for cut in cuts]
    try:
        turned, mask = decoder.rotary_emb(hidden, places), _causal(hidden)
        for number, layer in enumerate(decoder.layers):
            if number in cuts:
                stop = start + rows.numel()
                pick, states = cuts[number](noted.pop(number), hidden[0], torch.arange(start, stop, device=ids.device))
                hidden = torch.cat((hidden[:, :start], states[None], hidden[:, stop:]), dim=1)
                places = torch.cat((places[:, :start], places[:, start + pick], places[:, stop:]), dim=1)
                turned, mask = decoder.rotary_emb(hidden, places), _causal(hidden)
                rows = rows[pick]
                left.append(rows)
                if number == max(cuts):
                    reached()
            whole = number in eager
            with _attending(decoder.config, "eager" if whole else "sdpa"):
                hidden = layer(
                    hidden,
                    attention_mask=mask if whole else None,  # sdpa is causal without one
                    position_ids=places,
                    position_embeddings=turned,
                    past_key_values=cache,
                    use_cache=True,
                )
    finally:
        for handle in handles:
            handle.remove()
    return Prefill(left, model.get_output_embeddings()(decoder.norm(hidden[:, -1])))


def _causal(hidden: Tensor) -> Tensor:
    """[1, 1, l, l]: 0 where a query sees a key, the smallest number elsewhere."""
    length = hidden.shape[1]
    return hidden.new_full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)


def known(pick: Tensor) -> Cut:
    """No method: the limit of what dropping can bring, where the choice was made beforehand."""
    return lambda attention, hidden, places: (pick, hidden[places[pick]])


def fastv(keep: int) -> Cut:
    """FastV (arXiv 2403.06764): the last token's row of the heads' mean of the whole attention matrix of one layer."""

    def cut(attention: Tensor, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        pick = attention.mean(dim=0)[-1, places].topk(keep).indices.sort().values
        return pick, hidden[places[pick]]

    return cut


def sparsevlm(features: Tensor, question: Tensor, parts: tuple[int, int, int], left: list[Tensor], rank: bool) -> Cut:
    """SparseVLM (arXiv 2410.04417): what raters look at in a whole attention matrix; some of the rest recycled.

    1. A cluster's mean stands at its centre, not after all kept tokens.
    2. No noise on densities.
    3. `rank`: the rank of the raters' attention, from which version 1.0 takes its count, is computed, but the count is
       that of the schedule.

    Args:
        features: [n, d] of the picture, as they enter the language model.
        question: [t, d] embeddings of the t last tokens of the prompt, those after the picture.
        parts: tokens kept, recycled, clusters; the last two 0 where nothing is recycled.
        left: the rows after the cuts before this one are its last entry; empty before the first. This cut adds its own.
        rank: version 1.0's.
    """
    kept, pool, clusters = parts
    share = (features.float() @ question.float().T).softmax(dim=1).mean(dim=0)
    chosen = (share >= share.mean() * (1 - 1e-6)).nonzero().flatten()

    def cut(attention: Tensor, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        rows = left[-1] if left else torch.arange(len(features), device=features.device)
        raters = attention.shape[1] - len(share) + chosen
        relation = attention[:, raters][:, :, places].mean(dim=0)  # [raters, m]
        if rank:
            torch.linalg.matrix_rank(relation.float())
        scores = relation.mean(dim=0)
        pick, states = scores.topk(kept).indices, hidden[places]
        if clusters:
            rest = scores.clone()
            rest[pick] = -torch.inf
            dropped = rest.topk(pool).indices.sort().values
            centres, means = recycled(states[dropped], clusters)
            states = states.index_copy(0, dropped[centres], means)
            pick = torch.cat((pick, dropped[centres]))
        pick = pick.sort().values
        left.append(rows[pick])
        return pick, states[pick]

    return cut


def recycled(rows: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density peaks of [m, d] rows: centres [clusters], and each cluster's mean [clusters, d].

    density = exp(-mean squared distance to as many nearest rows as clusters), delta = the distance to the nearest
    denser row, the largest distance there is for the densest; centres have the largest product.
    """
    distance = torch.cdist(rows[None].float(), rows[None].float())[0] / rows.shape[1] ** 0.5
    near = distance.topk(clusters, dim=1, largest=False).values
    density = near.square().mean(dim=1).neg().exp()
    denser = density[None] > density[:, None]
    delta = torch.where(denser, distance, distance.max()).amin(dim=1)
    centres = (density * delta).topk(clusters).indices
    nearest = distance[:, centres].argmin(dim=1)
    nearest[centres] = torch.arange(clusters, device=rows.device)
    one_hot = torch.nn.functional.one_hot(nearest, clusters).to(rows.dtype)
    return centres, one_hot.T @ rows / one_hot.sum(dim=0)[:, None]
