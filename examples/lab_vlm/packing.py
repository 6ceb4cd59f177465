"""Many questions behind one picture in one sequence: each sees the picture and itself only, and positions restart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .questions import Question
from .scenes import GRID
from .vlm import build_tokenizer, prompt, spell

PATCHES = GRID * GRID
# Questions a picture, by family; a picture that has fewer gives what it has.
SHARE = {"existence": 4, "perception": 8, "science": 4, "diagram": 4, "reading": 4, "text": 2}


@dataclass
class Packed:
    """One batch: visual tokens first, then every question of the picture in a block of its own."""

    keep: list[np.ndarray]  # kept patches of each picture
    ids: torch.Tensor  # [b, t] question and answer tokens
    positions: torch.Tensor  # [b, 1 + v + t]
    segment: torch.Tensor  # [b, 1 + v + t]: 0 prefix, 1.. question, -1 padding
    target: torch.Tensor  # [b, t] next token to predict, -100 where none
    row: torch.Tensor  # [r, 2] (picture, index into t) of each question's last prompt token
    evidence: torch.Tensor  # [r, v] share of each kept patch covered by that question's evidence
    family: list[tuple[int, int, int, str]]  # picture, first and last target index, family


class Packer:
    """Chooses questions and turns them into tokens."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.eos = self.tokenizer.eos_token_id
        self.prompts: dict[str, list[int]] = {}

    def tokens(self, q: Question) -> tuple[list[int], list[int]]:
        """(prompt, answer) as token ids; what is read off the picture is spelled."""
        if q.question not in self.prompts:
            text = prompt(q.question, image=False)
            self.prompts[q.question] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if q.family in ("reading", "text"):
            answer = spell(q.answer, self.tokenizer)
        else:
            answer = self.tokenizer(q.answer, add_special_tokens=False)["input_ids"]
        return self.prompts[q.question], [*answer, self.eos]

    def choose(self, questions: list[Question], rng: np.random.Generator) -> list[Question]:
        """A random few of each family."""
        chosen: list[Question] = []
        for family, count in SHARE.items():
            pool = [q for q in questions if q.family == family]
            chosen += [pool[i] for i in rng.permutation(len(pool))[:count]]
        return chosen

    def stepping_stones(self, questions: list[Question], rng: np.random.Generator) -> list[Question]:
        """Colour and place asked openly, "what is the cat?", "where is the cat?": training only, no family of its own.

        From yes and no alone, these comparisons start late: the reader must already know what to compare.
        """
        true = [q for q in questions if q.kind in ("colour", "position") and q.answer == "yes"]
        stones = []
        for i in rng.permutation(len(true))[:6]:
            _, _, name, *_, value = true[i].question.rstrip("?").split(" ")
            ask, answer = "what", value
            if true[i].kind == "position":
                weight = true[i].evidence.reshape(GRID, GRID).astype(float)
                row, column = (float(np.average(np.arange(GRID), weights=weight.sum(axis))) for axis in (1, 0))
                ask = "where"
                answer = f"{('top', 'bottom')[row > (GRID - 1) / 2]} {('left', 'right')[column > (GRID - 1) / 2]}"
            stones.append(Question("perception", "stone", f"{ask} is the {name}?", answer, true[i].evidence))
        return stones

    def pack(self, batch: list[list[Question]], keep: list[np.ndarray], renumber: bool) -> Packed:
        """The questions of each picture, which keeps the patches `keep`, numbered anew or as in the whole picture."""
        v = len(keep[0])
        ids, positions, segments, targets, rows, evidence, families = [], [], [], [], [], [], []
        for b, questions in enumerate(batch):
            line: list[int] = []
            goal: list[int] = []
            place = [0, *(range(1, 1 + v) if renumber else (1 + keep[b]).tolist())]
            first = 1 + (v if renumber or v == 0 else PATCHES)
            segment = [0] * (1 + v)
            for s, q in enumerate(questions, 1):
                ask, answer = self.tokens(q)
                start = len(line) + len(ask) - 1
                families.append((b, start, start + len(answer), q.family))
                if v and q.evidence[keep[b]].max(initial=0) > 40:
                    rows.append((b, start))
                    evidence.append(q.evidence[keep[b]].astype(np.float32) / 255)
                line += [*ask, *answer[:-1]]
                goal += [-100] * (len(ask) - 1) + answer
                segment += [s] * (len(ask) + len(answer) - 1)
                place += range(first, first + len(ask) + len(answer) - 1)
            ids.append(line)
            positions.append(place)
            segments.append(segment)
            targets.append(goal)
        t = max(len(line) for line in ids)
        pad = lambda rows, width, value: torch.tensor([r + [value] * (width - len(r)) for r in rows])  # noqa: E731
        return Packed(
            keep=keep,
            ids=pad(ids, t, 0),
            positions=pad(positions, 1 + v + t, 0),
            segment=pad(segments, 1 + v + t, -1),
            target=pad(targets, t, -100),
            row=torch.tensor(rows).reshape(-1, 2),
            evidence=torch.from_numpy(np.array(evidence, np.float32).reshape(len(rows), v)),
            family=families,
        )


def block_mask(segment: torch.Tensor) -> torch.Tensor:
    """Boolean attention mask [b, 1, l, l]: causal; the prefix is seen by all, a question only by itself."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    return ((same | (segment[:, None, :] == 0)) & causal)[:, None]


def drop(batch: list[list[Question]], rng: np.random.Generator, enabled: bool) -> list[np.ndarray]:
    """Which patches each picture of the batch keeps: all, a random share, or pieces plus a random share; or none."""
    b, u = len(batch), rng.random()
    if u < 0.04:
        return [np.arange(0)] * b
    if not enabled or u < 0.35:
        return [np.arange(PATCHES)] * b
    k = max(6, round(PATCHES * float(np.exp(rng.uniform(np.log(0.06), np.log(0.8))))))
    kept = []
    for questions in batch:
        order = rng.random(PATCHES)
        if u > 0.7:  # whole pieces first: the evidence of some of the questions
            for i in rng.permutation(len(questions))[: int(rng.integers(1, 7))]:
                order += 2.0 * (questions[i].evidence > 40)
        kept.append(np.sort(np.argpartition(-order, k - 1)[:k]))
    return kept
