"""Second implementations of methods, after what their authors' code does: plain lists, float64, one pair at a time.

What the authors' own code chose is in tests/pruners/authors/choices.json, which holds these and ours to it
(test_authors_choices.py); test_llm.py and test_input.py hold ours to these on many other inputs.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from naive import cosine

Groups = dict[int, list[int]]
"""Kept row -> the rows whose mean stands for it, itself among them."""


def falling(values: Sequence[float], among: Collection[int] | range | None = None) -> list[int]:
    """Indices by falling value; among equals the lower first."""
    return sorted(range(len(values)) if among is None else sorted(among), key=lambda i: -values[i])


def cosines(rows: Tensor) -> list[list[float]]:
    """Of all pairs: one product, where one pair at a time would take too long."""
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    return (unit @ unit.T).tolist()


def hiprune(middle: Sequence[float], deep: Sequence[float], width: int, keep: int, alpha: float) -> list[int]:
    last = len(middle) - 1
    near = set()
    for anchor in falling(middle)[: min(keep // 5, round(keep * alpha / 5))]:
        for place in (anchor, anchor - 1, anchor + 1, anchor - width, anchor + width):
            near.add(0 if place < 0 else last if place > last else place)
    registers = [i for i in falling(deep) if i not in near]
    return sorted([*near, *registers[: keep - len(near)]])


def vispruner(looked: Sequence[float], rows: Tensor, keep: int, share: float, step: int) -> list[int]:
    order = falling(looked)
    important = math.floor(share * keep + 1e-9)
    first, rest = order[:important], order[important:]
    if keep == important:
        return sorted(first)
    while len(rest) > keep - important:
        going = min(step, len(rest) - (keep - important))
        odd = rest[1::2]
        alike = [(max((cosine(rows[i], rows[j]) for j in odd), default=-2.0), i) for i in rest[::2]]
        alike.sort(key=lambda pair: -pair[0])
        rest = [i for _, i in alike[going:]] + odd
    return sorted(first + rest)


def vscan(
    near: Sequence[float], far: Sequence[float], rows: Tensor, grid: tuple[int, int], keep: int, local: float, size: int
) -> Groups:
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(grid[0] * grid[1]):
        windows.setdefault((i // grid[1] // size, i % grid[1] // size), []).append(i)
    ranked = [falling(near, window) for window in windows.values()]
    quota, chosen, turn = math.floor(local * keep + 1e-9), [], 0
    while len(chosen) < quota:  # the best of each window, then the second of each, ...
        chosen += falling(near, [window[turn] for window in ranked if turn < len(window)])[: quota - len(chosen)]
        turn += 1
    chosen += [i for i in falling(far) if i not in chosen][: keep - quota]
    groups = {i: [i] for i in sorted(chosen)}
    for i in set(range(len(near))) - set(chosen):
        groups[max(groups, key=lambda j: cosine(rows[i], rows[j]))].append(i)
    return groups


def peaks(rows: Tensor, clusters: int) -> tuple[list[int], list[int]]:
    """Centres, ascending, and the place of each row's centre among them."""
    m, d = rows.shape
    x = rows.double()
    far = [[float((x[i] - x[j]).norm()) / math.sqrt(d) for j in range(m)] for i in range(m)]
    density = [math.exp(-sum(one**2 for one in sorted(row)[:clusters]) / clusters) for row in far]
    worth = []
    for i in range(m):
        denser = [far[i][j] for j in range(m) if (density[j], -j) > (density[i], -i)]
        worth.append(density[i] * (min(denser) if denser else max(map(max, far))))
    centres = sorted(falling(worth)[:clusters])
    return centres, [min(range(clusters), key=lambda c: (centres[c] != i, far[i][centres[c]])) for i in range(m)]


def raters(visual: Tensor, words: Tensor) -> list[int]:
    """Which of the words after the image rate: share above the mean, or equal to it up to rounding."""
    share = (visual.double() @ words.double().T).softmax(dim=1).mean(dim=0).tolist()
    mean = sum(share) / len(share)
    return [t for t, one in enumerate(share) if one >= mean * (1 - 1e-6)]


def sparsevlm(score: Sequence[float], rows: Tensor, kept: int, recycled: int, clusters: int) -> Groups:
    """One cut: the best `kept`, and of the best `recycled` others the clusters, each at its centre."""
    order = falling(score)
    groups = {i: [i] for i in order[:kept]}
    pool = sorted(order[kept : kept + recycled]) if clusters else []
    centres, to = peaks(rows[pool], clusters) if clusters else ([], [])
    groups |= {pool[centre]: [] for centre in centres}
    for i, centre in zip(pool, to, strict=True):
        groups[pool[centres[centre]]].append(i)
    return groups


def pumer(score: Sequence[float], keys: Tensor, pruned: int, merged: int) -> Groups:
    line = falling(score)[: len(score) - pruned]
    edges = []
    for a in line[2::2]:
        if line[1::2]:
            b = max(line[1::2], key=lambda b: cosine(keys[a], keys[b]))
            edges.append((cosine(keys[a], keys[b]), a, b))
    edges = sorted(edges, key=lambda edge: -edge[0])[:merged]
    groups = {i: [i] for i in line if i not in [a for _, a, _ in edges]}
    for _, a, b in edges:
        groups[b].append(a)
    return groups


def dart(
    states: Tensor,
    sizes: Sequence[float],
    text: Tensor,
    text_sizes: Sequence[float],
    keep: int,
    pivots: int = 4,
    text_pivots: int = 4,
) -> list[int]:
    own = sorted(falling(sizes)[: min(keep, pivots)])
    chosen = list(own)
    ends = [states[i] for i in own] + [text[i] for i in sorted(falling(text_sizes)[:text_pivots])]
    for number, end in enumerate(ends):
        each, over = divmod(keep - len(own), len(ends))
        rest = sorted((i for i in range(len(sizes)) if i not in chosen), key=lambda i: cosine(states[i], end))
        chosen += rest[: each + (number < over)]
    return sorted(chosen)


def mustdrop(looks: Tensor, always: Collection[int], g: float, i: float) -> list[int]:
    """What one filter leaves, of [t, n] attention of the text after the image."""
    a = looks.double().tolist()
    total = sum(map(sum, a))
    n = looks.shape[1]
    return [v for v in range(n) if v in always or sum(r[v] for r in a) >= g * total or max(r[v] for r in a) >= i]


def hired(first: Sequence[float], tiles: int, budget: int, alpha: float) -> list[int]:
    """What the code gives each tile: its strip of the thumbnail's raster counts, and rounding loses tokens."""
    n = len(first)
    strong = falling(first)[: int(n * (1 - alpha))]
    hits = [sum(i * tiles // n == tile for i in strong) for tile in range(tiles)]
    return [int(hit / sum(hits) * (budget - int(budget * alpha))) for hit in hits]


def otprune(rows: Tensor, keep: int, gamma: float) -> list[int]:
    """argmax det K_S one token at a time, with real determinants."""
    x = rows.double()
    x = torch.stack([column / max(float(column.norm()), 1e-12) for column in x.T], dim=1)
    gram = x @ x.T
    kernel = torch.eye(len(x), dtype=torch.float64) + gamma * gram @ gram.T
    chosen: list[int] = []
    while len(chosen) < keep:
        worth = {i: float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]])[1]) for i in range(len(x))}
        chosen.append(max((i for i in worth if i not in chosen), key=lambda i: (round(worth[i], 9), -i)))
    return sorted(chosen)


def scope(looked: Sequence[float], rows: Tensor, keep: int, alpha: float) -> list[int]:
    n, alike = len(looked), cosines(rows)
    chosen: list[int] = []
    while len(chosen) < keep:
        covered = [max([0.0, *(alike[i][j] for j in chosen)]) for i in range(n)]
        worth = [sum(max(0.0, alike[i][j] - covered[i]) for i in range(n)) * looked[j] ** alpha for j in range(n)]
        chosen.append(falling(worth, [j for j in range(n) if j not in chosen])[0])
    return sorted(chosen)


def mmr(scores: Tensor, rows: Tensor, keep: int, balance: float) -> list[int]:
    low, high = float(scores.min()), float(scores.max())
    worth, alike = [(float(score) - low) / (high - low) for score in scores], cosines(rows)
    chosen: list[int] = []
    while len(chosen) < keep:
        rest = [i for i in range(len(worth)) if i not in chosen]
        again = {i: max((alike[i][j] for j in chosen), default=0.0) for i in rest}
        left = [balance * one - (1 - balance) * again.get(i, 0.0) for i, one in enumerate(worth)]
        chosen.append(falling(left if chosen else worth, rest)[0])
    return sorted(chosen)


def holov(looked: Sequence[float], rows: Tensor, keep: int, crops: int, alpha: float) -> list[int]:
    n, cosine_of = len(looked), cosines(rows)
    crops = min(crops, n)
    runs, start = [], 0
    for c in range(crops):
        runs.append(range(start, start + n // crops + (c < n % crops)))
        start = runs[-1].stop
    weight = []
    for run in runs:
        a = [1e3 * looked[i] for i in run]
        spread = []
        for i in run:
            alike = [0.0 if i == j else cosine_of[i][j] for j in run]
            mean = sum(alike) / max(1, len(run) - 1)
            spread.append(sum((one - mean) ** 2 for one in alike) / max(1, len(run) - 1))
        scale = sum(a) / (sum(spread) + 1e-6 * len(run))
        weight.append(sum(one + alpha * scale * v for one, v in zip(a, spread, strict=True)) / len(run))
    count = [int(keep * w / (sum(weight) + 1e-6)) for w in weight]
    for c in falling(weight)[: keep - sum(count)]:
        count[c] += 1
    chosen = [i for run, most in zip(runs, count, strict=True) for i in falling(looked, run)[:most]]
    return sorted(chosen + [i for i in falling(looked) if i not in chosen][: keep - len(chosen)])


def apet(rows: Tensor, keep: int, size: int) -> Groups:
    """The basis alone, and every other kept row with those that go to it."""
    x = rows.double()
    n = len(x)
    basis = [falling([float(one.norm()) for one in x])[0]]
    while len(basis) < min(size, keep):
        far = (x[:, None] - x[basis][None]).norm(dim=2).amin(dim=1).tolist()
        basis.append(falling(far, [i for i in range(n) if i not in basis])[0])
    span = torch.linalg.pinv(x[basis]) @ x[basis]
    error = [float((one - one @ span).norm()) for one in x]
    others = falling(error, [i for i in range(n) if i not in basis])[: keep - len(basis)]
    groups = {i: [i] for i in sorted(basis + others)}
    alike = cosines(rows)
    for i in range(n):
        if others and i not in groups:
            groups[max(sorted(others), key=lambda j: alike[i][j])].append(i)
    return groups


def fine(rows: Tensor, grid: tuple[int, int], cutoff: float) -> list[float]:
    """Mean over channels of the high-pass, with the sums of the Fourier transform written out."""
    h, w = grid
    waves = {}
    for u in range(h):
        for v in range(w):
            waves[u, v] = torch.tensor(
                [cmath.exp(2j * math.pi * (u * y / h + v * x / w)) for y in range(h) for x in range(w)],
                dtype=torch.complex128,
            )
    x = rows.to(torch.complex128)
    high = torch.zeros_like(x)
    for (u, v), wave in waves.items():
        square = min(u, h - u) ** 2 + min(v, w - v) ** 2
        width = cutoff * min(h // 2, w // 2)
        passed = float(square > 0) if width == 0 else 1 - math.exp(-square / (2 * width**2))
        high += passed * wave[:, None] * (wave.conj() @ x) / (h * w)
    return high.abs().mean(dim=1).tolist()


def clse(
    before: Tensor, after: Tensor, looked: Sequence[float], grid: tuple[int, int], cutoff: float, heat: float
) -> list[float]:
    old, new = fine(before, grid, cutoff), fine(after, grid, cutoff)
    mean = sum(old) / len(old)
    change = [min(1.0, abs(b - a) / (mean + a + 1e-6)) for a, b in zip(old, new, strict=True)]
    middle = sum(change) / len(change)
    spread = math.sqrt(sum((one - middle) ** 2 for one in change) / (len(change) - 1))
    moved = [(one - middle) / (spread + 1e-6) / heat for one in change]
    return [a / (1 + math.exp(-one)) for one, a in zip(moved, looked, strict=True)]


def priortr(text: Tensor, last: Tensor | None) -> list[float]:
    """Of [H, t, n] attention of the text after the image, and of the last token [H, n] if that alone is P."""
    task = (text.double().mean(dim=(0, 1)) if last is None else last.double().mean(dim=0)).tolist()
    null = text.double()[:, 0].mean(dim=0).tolist()
    return [p / sum(task) * math.log(p / sum(task) / (q / sum(null))) for p, q in zip(task, null, strict=True)]


def vlm_pruner(
    states: Tensor, keys: Tensor, grid: tuple[int, int], keep: int, pivots: int, threshold: float, batch: int
) -> list[int]:
    n, width = len(states), grid[1]
    chosen = [falling([float(row.double().abs().sum()) for row in keys])[0]]
    while len(chosen) < min(pivots, keep):
        far = (keys.double()[:, None] - keys.double()[chosen][None]).norm(dim=2).amin(dim=1).tolist()
        chosen.append(falling(far, [i for i in range(n) if i not in chosen])[0])
    alike = cosines(states[:, falling(states.double().var(dim=0, correction=0).tolist())[:256]])

    def worth(i: int) -> float:
        near = min(math.dist(divmod(i, width), divmod(j, width)) for j in chosen)
        return max(alike[i][j] for j in chosen) * (1 + near / math.hypot(*grid) / 2)

    while len(chosen) < keep:
        value = {i: worth(i) for i in range(n) if i not in chosen}
        order, before = sorted(value, key=lambda i: value[i]), len(chosen)
        for start in range(0, len(order), batch):
            if len(chosen) == keep or (start == batch and len(chosen) == before):
                break
            now = {i: worth(i) for i in order[start : start + batch]}
            under = [i for i in now if now[i] < threshold]
            room = keep - len(chosen)
            chosen += under if len(under) <= room else sorted(now, key=lambda i: now[i])[:room]
        threshold += 0.1
    return sorted(chosen)


def hawk(queries: Tensor, keys: Tensor, weights: Sequence[float]) -> list[float]:
    """Of queries [t, H, d_h] and keys [n, H, d_h]."""
    score = [0.0] * len(keys)
    for head, weight in enumerate(weights):
        products = (queries[:, head].double() @ keys[:, head].double().T).mean(dim=0).tolist()
        length = math.sqrt(sum(one**2 for one in products))
        score = [a + weight * one / length for a, one in zip(score, products, strict=True)]
    return score


def ivc_prune(text: Tensor, values: Tensor, turns: Tensor, keep: int, coordinates: float, seeds: float) -> list[int]:
    """Of values [t, H, d_h] and [n, H, d_h], and cosines and sines [n, 2, d]; first come, first kept."""
    n, (heads, width) = len(values), values.shape[1:]

    def looks(query: Tensor) -> list[float]:
        """What one query [H, d_h] gives each of the n tokens."""
        total = [0.0] * n
        for head in range(heads):
            products = [float(query[head].double() @ one[head].double()) / math.sqrt(width) for one in values]
            parts = [math.exp(product) for product in products]
            total = [a + part / sum(parts) / heads for a, part in zip(total, parts, strict=True)]
        return total

    asked = [looks(query) for query in text]
    best = falling([sum(column) for column in zip(*asked, strict=True)])[: max(1, round(seeds * n))]
    asked += [looks(values[i]) for i in best]
    score = [sum(column) for column in zip(*asked, strict=True)]
    share = round(coordinates * keep)
    places = {i for part in turns.double().mean(dim=2).T.tolist() for i in falling(part)[:share]}
    order = [i for i in falling(score) if i in places]
    order += [i for i in falling(score) if i in best and i not in places]
    order += [i for i in falling(score) if i not in order]
    return sorted(order[:keep])


def prunesid(rows: Tensor, keep: int) -> list[int]:
    n = len(rows)
    spread = torch.sigmoid(rows.double())
    spread = spread - spread.mean(dim=1, keepdim=True)
    parts = min(max(keep // 4, 4), keep, *rows.shape)
    entry = torch.linalg.svd(spread)[0][:, :parts].abs().tolist()
    group = [falling(one)[0] for one in entry]
    alike = cosines(rows)
    threshold = max(18 * keep / n, 1) * sum(alike[i][j] for i in range(n) for j in range(i, n)) / n**2
    apart: list[list[int]] = [[] for _ in range(parts)]
    for i in falling([max(one) for one in entry]):
        if all(alike[i][j] <= threshold for j in apart[group[i]]):
            apart[group[i]].append(i)
    size = [group.count(g) for g in range(parts)]
    most = [min(size[g], 5 * math.ceil(keep / 64), len(apart[g])) for g in range(parts)]
    while sum(most) < keep:
        most = [min(one + 1, size[g]) for g, one in enumerate(most)]
    others = keep - sum(one > 0 for one in size)
    ends, total = [0], torch.tensor(0.0)
    for one in apart:  # in float32, whose halves decide
        total = total + torch.tensor(len(one)) / torch.tensor(sum(map(len, apart)))
        ends.append(round(float(total * others)))
    count = [min((size[g] > 0) + ends[g + 1] - ends[g], most[g]) for g in range(parts)]
    for g in falling([len(one) for one in apart]):
        count[g] += min(most[g] - count[g], keep - sum(count))
    chosen = []
    for g in range(parts):
        back = [i for i in falling([max(one) for one in entry]) if group[i] == g and i not in apart[g]]
        chosen += (apart[g] + back)[: count[g]]
    return sorted(chosen)


def anchors(rows: Tensor, count: int) -> Groups:
    n, alike = len(rows), cosines(rows)
    density = [sum(row) for row in alike]
    thin = [[alike[i][j] for j in range(n) if density[j] < density[i]] for i in range(n)]
    worth = [density[i] * (1 - max(thin[i])) if thin[i] else density[i] for i in range(n)]
    groups = {i: [i] for i in sorted(falling(worth)[:count])}
    for i in set(range(n)) - set(groups):
        groups[max(groups, key=lambda j: alike[i][j])].append(i)
    return {anchor: sorted(those) for anchor, those in groups.items()}
