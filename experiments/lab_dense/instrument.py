"""What `lab-dense` is like, measured on validation boards: evidence, norms, the CLS token, and whether sets nest.

    PYTHONPATH=examples python -m experiments.lab_dense.instrument      # writes results/instrument.json; minutes

- evidence: how many units and tokens hold it, how many other things are on the board, and the norms of their tokens.
- hits: the share of things that an even grid of tokens lies on.
- CLS: the share of the CLS token's attention, last layer, that falls on things, beside the share of tokens that are on
  things; the same for the first lab on its own scenes.
- nested: the best sets of 8 and of 32 tokens that a search finds for a question. If the best set of 8 were part of the
  best set of 32, one ranking could serve both budgets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from experiments.results import write_json
from gripvlm import lab
from gripvlm.eval.environment import git_state, hardware
from gripvlm.pruners.baselines.grid import lattice
from lab_dense.boards import GRID, Facts, compose, units
from lab_dense.packing import IMAGE, Asked, Packer
from lab_dense.questions import OF_ONE, PATCHES, Question, Things, ask, order
from lab_vlm import compose as first_compose
from lab_vlm.train_tower import normalised

HERE = Path(__file__).parent
FIRST_SEED = 450_000
SMALL, LARGE = 8, 32


class Boards:
    """Validation boards with the tower's tokens."""

    def __init__(self, model: Any, count: int):
        boards = [compose(FIRST_SEED + i, "val") for i in range(count)]
        self.things = [Things(Facts(b.things, b.centre, units(b))) for b in boards]
        self.pixels = normalised(np.stack([b.scene.image for b in boards]))
        with torch.no_grad():
            self.tokens = model.model.vision_tower(self.pixels).last_hidden_state[:, 1:]


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, q)), 3) for name, q in (("p10", 10), ("median", 50), ("p90", 90))}


def evidence(model: Any, boards: Boards) -> dict[str, Any]:
    rng, found = np.random.default_rng(0), {}
    norms = model.model.multi_modal_projector(boards.tokens).norm(dim=-1)
    for family in OF_ONE:
        groups, tokens, others, ratio = [], [], [], []
        for i, things in enumerate(boards.things):
            question = ask([things], family, rng)
            if question is None:
                continue
            shown = things.facts.units
            mine = {unit for group in question.evidence for _, unit in group}
            on = np.isin(shown, [*mine])
            groups.append(len(question.evidence))
            tokens.append(int(on.sum()))
            others.append((len({*shown.tolist()} - {-1} - mine)) / len(mine))
            rest = (shown >= 0) & ~on
            if rest.any():
                ratio.append(float(norms[i][on].mean() / norms[i][rest].mean()))
        found[family] = {
            "groups": spread(groups),
            "tokens": spread(tokens),
            "other things a unit of evidence": spread(others),
            "norm of evidence / of other things": spread(ratio),
        }
    return found


def hit_by_a_grid(boards: Boards) -> dict[str, float]:
    """Share of the things that at least one token of an even grid lies on, by tokens."""
    found = {}
    for keep in (64, 32, 15, 8):
        cells = lattice((GRID, GRID), keep)[0].numpy()
        hits = []
        for things in boards.things:
            units = things.facts.units
            singles = np.flatnonzero(things.single)
            hits.append(np.isin(singles, units[cells]).mean())
        found[str(keep)] = round(float(np.mean(hits)), 3)
    return found


def cls_attention(model: Any, pixels: torch.Tensor, on_things: np.ndarray) -> dict[str, float]:
    """Share of the CLS token's attention to patches that falls on things, mean over heads and pictures."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    rows = []

    def record(_module: Any, _args: Any, output: Any) -> None:
        rows.append(output[1][:, :, 0, 1:].mean(1))

    handle = tower.encoder.layers[-1].self_attn.register_forward_hook(record)
    with torch.no_grad():
        tower(pixels)
    handle.remove()
    tower.set_attn_implementation("sdpa")
    share = torch.cat(rows) / torch.cat(rows).sum(-1, keepdim=True)
    mass = (share * torch.from_numpy(on_things)).sum(-1)
    return {
        "attention on things": round(float(mass.mean()), 3),
        "tokens on things": round(float(on_things.mean()), 3),
    }


class Search:
    """The best set of k tokens for a question, by swaps that raise the answer's log-probability."""

    def __init__(self, model: Any, tokens: torch.Tensor, question: Question):
        packer = Packer()
        ids = packer.tokens(question.question, question.answer, question.family in ("extreme", "string"))
        self.model, self.tokens, self.packer = model, tokens[None], packer
        self.asked = Asked(question.family, *ids, [])

    @torch.no_grad()
    def values(self, sets: list[np.ndarray]) -> np.ndarray:
        """Mean log-probability of the answer's tokens with each of the sets, which are of one size."""
        packed = self.packer.pack([[self.asked]] * len(sets), [np.sort(s) for s in sets], 1, renumber=False)
        kept = self.tokens.expand(len(sets), -1, -1).gather(
            1, packed.keep[..., None].expand(-1, -1, self.tokens.shape[-1])
        )
        visual = self.model.model.multi_modal_projector(kept)
        embeds = self.model.get_input_embeddings()(packed.ids)
        embeds = embeds.masked_scatter((packed.ids == IMAGE)[..., None], visual)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
        wanted = packed.target >= 0
        scores = F.log_softmax(self.model.lm_head(hidden[wanted]), -1)
        return scores.gather(1, packed.target[wanted][:, None]).view(len(sets), -1).mean(1).numpy()

    def best(
        self, start: np.ndarray, rng: np.random.Generator, rounds: int, fixed: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """From `start`, 16 sets with one to four swaps a round; `fixed` tokens are never dropped."""
        current, value = start, float(self.values([start])[0])
        for _ in range(rounds):
            proposals = []
            for _ in range(16):
                free = current if fixed is None else np.setdiff1d(current, fixed)
                swaps = min(int(rng.integers(1, 5)), len(free))
                out = rng.permutation(free)[:swaps]
                new = rng.permutation(np.setdiff1d(np.arange(PATCHES), current))[:swaps]
                proposals.append(np.concatenate([np.setdiff1d(current, out), new]))
            scores = self.values(proposals)
            if scores.max() > value:
                current, value = proposals[int(scores.argmax())], float(scores.max())
        return current, value


def nested(model: Any, boards: Boards, questions: int, rounds: int) -> dict[str, Any]:
    rng, rows = np.random.default_rng(1), []
    families = [*OF_ONE]
    for i in range(10 * questions):
        things = boards.things[i % len(boards.things)]
        question = ask([things], families[i % len(families)], rng)
        if question is None:
            continue
        cells = order(question, [things.facts])
        rest = np.setdiff1d(np.arange(PATCHES), cells)
        ranked = np.array([*cells, *rng.permutation(rest)])
        search = Search(model, boards.tokens[i % len(boards.things)], question)
        small, at_small = search.best(ranked[:SMALL], rng, rounds)
        large, at_large = search.best(ranked[:LARGE], rng, rounds)
        extended = np.array([*small, *[c for c in ranked if c not in small]])[:LARGE]
        _, at_nested = search.best(extended, rng, rounds, fixed=small)
        rows.append(
            {
                "family": question.family,
                "shared": len(np.intersect1d(small, large)) / SMALL,
                "small": at_small,
                "large": at_large,
                "large that holds small": at_nested,
            }
        )
        if len(rows) == questions:
            break
        print(f"nested: {len(rows)}/{questions}", end="\r", file=sys.stderr, flush=True)
    loss = [np.exp(r["large"]) - np.exp(r["large that holds small"]) for r in rows]
    return {
        "questions": len(rows),
        "rounds": rounds,
        "best small set is part of best large set": float(np.mean([r["shared"] == 1 for r in rows])),
        "share of the small set that is in the large set": spread([r["shared"] for r in rows]),
        "answer probability": {
            name: round(float(np.mean([np.exp(r[name]) for r in rows])), 4)
            for name in ("small", "large", "large that holds small")
        },
        "lost by holding the small set": spread(loss),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, in place of the lab-dense that ships")
    parser.add_argument("--boards", type=int, default=200)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    if given.model:
        from gripvlm.models.loading import load_model

        model = load_model(given.model, "cpu")[0]
    else:
        model = lab.load("lab-dense")[0]
    boards = Boards(model, given.boards)
    scenes = [first_compose.compose(FIRST_SEED + i, "val") for i in range(given.boards)]
    scene_pixels = normalised(np.stack([scene.image for scene in scenes]))
    on_scenes = np.stack([scene.owners().reshape(-1) >= 0 for scene in scenes])
    on_boards = np.stack([things.facts.units >= 0 for things in boards.things])
    content = {
        "command": f"python -m experiments.lab_dense.instrument {' '.join(sys.argv[1:])}".strip(),
        "git": git_state(),
        "hardware": hardware(),
        "boards": given.boards,
        "evidence": evidence(model, boards),
        "things hit by a grid of so many tokens": hit_by_a_grid(boards),
        "CLS": {
            "lab-dense on its boards": cls_attention(model, boards.pixels, on_boards),
            "lab-dense on the first lab's scenes": cls_attention(model, scene_pixels, on_scenes),
            "lab on its scenes": cls_attention(lab.load()[0], scene_pixels, on_scenes),
            "lab on boards": cls_attention(lab.load()[0], boards.pixels, on_boards),
        },
        "nested": nested(model, boards, given.questions, given.rounds),
    }
    write_json(HERE / "results" / "instrument.json", content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
