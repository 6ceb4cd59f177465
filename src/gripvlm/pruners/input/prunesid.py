"""PruneSID: group tokens by principal components, and share the budget by how much is left without repetition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.ranking import descending, rank_in_group
from gripvlm.types import Selection, VisualTokens


def quotas(sizes: Tensor, apart: Tensor, k: int) -> Tensor:
    """[q] how many of k tokens each of q groups keeps, of its size [q] and of how many of its tokens are apart [q].

    One of each group; the others in proportion to `apart`. At most min(5 ceil(k / 64), apart), raised by one for all
    groups until k fit; what a group cannot use goes to those with the largest `apart`, each filled before the next.
    Needs at most k groups that are not empty.
    """
    least = sizes.clamp(max=1)
    most = torch.minimum(sizes, apart).clamp(max=5 * math.ceil(k / 64))
    while int(most.sum()) < k:
        most = torch.minimum(most + 1, sizes)
    ends = ((apart / apart.sum()).cumsum(0) * (k - least.sum())).round().long()
    quota = torch.minimum(ends.diff(prepend=ends[:1] * 0) + least, most)
    for group in descending(apart).tolist():
        quota[group] += min(int(most[group] - quota[group]), k - int(quota.sum()))
    return quota


@dataclass(frozen=True)
class PruneSID(Pruner):
    """Importance and diversity (arXiv 2603.09480), as in the authors' code for Qwen2-VL.

    The principal components of the logistic function of the projected rows, channels as samples and tokens as
    variables: max(k // 4, 4) of them, [n] each. A token belongs to the component in which its entry is largest, and
    that entry is its score. In each group, from the highest score down, tokens more alike (cosine) to one before them
    than the threshold are set back; those that are not are apart. Groups get their `quotas`, for the tokens apart
    first and then for those set back, by score. The threshold is max(18 k / n, 1) x the mean of the upper triangle of
    the cosines, the zeros below it included.

    1. All components are exact. The code's `torch.pca_lowrank` draws numbers, on which much depends: on the test's
       made-up pictures it keeps 7 to 11 of the 32 tokens that exact ones do, and 122 to 139 of 192.
    2. With k < 4 there are k components; the code keeps at least 16 tokens, or all.
    3. Their code for LLaVA takes CLIP's rows, and scores by the attention of its CLS token, which is kept too.
    """

    name = "prunesid"
    source = "PruneSID, arXiv 2603.09480 (ICLR 2026)"

    def select(self, tokens: VisualTokens) -> Selection:
        rows, n, k = tokens.features.float(), tokens.n, tokens.keep
        parts = min(max(k // 4, 4), k, *rows.shape)
        spread = torch.sigmoid(rows)
        spread = spread - spread.mean(dim=1, keepdim=True)
        # Eigenvalues ascend.
        score, group = torch.linalg.eigh(spread @ spread.T).eigenvectors.flip(1)[:, :parts].abs().max(dim=1)
        # Equal rows, such as newlines, have equal entries only up to rounding: they must tie.
        same = rows.unique(dim=0, return_inverse=True)[1]
        places = torch.arange(n, device=rows.device)
        first = torch.full_like(places, n).scatter_reduce(0, same, places, "amin")[same]
        score, group = score[first], group[first]
        unit = normalize(rows, dim=-1)
        cosine = unit @ unit.T
        repeats = (cosine > max(18 * k / n, 1) * cosine.triu().mean()) & (group[:, None] == group)
        # On the host, as each token depends on those before it.
        repeats, back = repeats.cpu(), torch.zeros(n, dtype=torch.bool)
        for i in descending(score).tolist():
            if not back[i]:
                back |= repeats[i]
                back[i] = False
        score, group = score.cpu(), group.cpu()
        sizes, apart = (torch.bincount(one, minlength=parts) for one in (group, group[~back]))
        rank = rank_in_group(score + ~back, group)
        kept = (rank < quotas(sizes, apart, k)[group]).nonzero().flatten()
        return Selection(kept.to(tokens.device), n, sound=True)
