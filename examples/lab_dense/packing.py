"""Many questions behind one prompt's pictures in one sequence: each sees the pictures and itself only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from .questions import ORDINALS, PATCHES
from .vlm import build_tokenizer

IMAGE = 4
"""Token id of <image>."""


@dataclass
class Asked:
    """A question as tokens; groups: cells of each group of evidence, of the pictures one after another."""

    family: str
    ask: list[int]
    answer: list[int]
    groups: list[np.ndarray]


@dataclass
class Packed:
    """One batch: every prompt's pictures first, then its questions in a block each."""

    keep: torch.Tensor  # [b, v] kept cells of the prompt's pictures
    ids: torch.Tensor  # [b, l], IMAGE where a visual token goes
    positions: torch.Tensor  # [b, l]
    segment: torch.Tensor  # [b, l]: 0 prefix, 1.. question, -1 padding
    target: torch.Tensor  # [b, l] next token to predict, -100 where none
    rows: torch.Tensor  # [r, 2] (prompt, index into l) of each question's last prompt token
    evidence: torch.Tensor  # [r, v] bool: kept cells that are that question's evidence
    spans: list[tuple[int, int, int, str]]  # prompt, first and last target index, family

    def to(self, device: torch.device) -> Packed:
        """The same batch with its tensors there."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Packed(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in moved.items()})


class Packer:
    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.eos = self.tokenizer.eos_token_id
        self.names = self.tokenizer.convert_tokens_to_ids(list(ORDINALS))
        self.prompts: dict[str, list[int]] = {}

    def tokens(self, question: str, answer: str, spelled: bool) -> tuple[list[int], list[int]]:
        """(question, answer) as token ids; what is read off a picture is spelled."""
        if question not in self.prompts:
            text = f"{question} answer:"
            self.prompts[question] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if spelled:
            ids = self.tokenizer.convert_tokens_to_ids([answer[0], *(f"##{c}" for c in answer[1:])])
        else:
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return self.prompts[question], [*ids, self.eos]

    def pack(self, batch: Sequence[list[Asked]], keep: Sequence[np.ndarray], pictures: int, renumber: bool) -> Packed:
        """The questions of each prompt, which keeps `keep` of its cells, numbered anew or as in the whole prompt."""
        lines, places, segments, goals, rows, evidence, spans = [], [], [], [], [], [], []
        for b, questions in enumerate(batch):
            line, place = [1], [0]
            at = 1
            for p in range(pictures if len(keep[b]) else 0):
                if pictures > 1:
                    line.append(self.names[p])
                    place.append(at)
                    at += 1
                cells = keep[b][(keep[b] >= p * PATCHES) & (keep[b] < (p + 1) * PATCHES)] - p * PATCHES
                line += [IMAGE] * len(cells)
                place += list(range(at, at + len(cells))) if renumber else (at + cells).tolist()
                at += len(cells) if renumber else PATCHES
            segment, goal = [0] * len(line), [-100] * len(line)
            for s, q in enumerate(questions, 1):
                start = len(line) + len(q.ask) - 1
                spans.append((b, start, start + len(q.answer), q.family))
                if q.groups and len(keep[b]):
                    kept = np.isin(keep[b], np.concatenate(q.groups))
                    if kept.any():
                        rows.append((b, start))
                        evidence.append(kept)
                more = [*q.ask, *q.answer[:-1]]
                line += more
                goal += [-100] * (len(q.ask) - 1) + q.answer
                segment += [s] * len(more)
                place += range(at, at + len(more))
            lines.append(line)
            places.append(place)
            segments.append(segment)
            goals.append(goal)
        length = max(map(len, lines))

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        v = len(keep[0])
        return Packed(
            keep=torch.from_numpy(np.stack(keep)).long(),
            ids=pad(lines, 0),
            positions=pad(places, 0),
            segment=pad(segments, -1),
            target=pad(goals, -100),
            rows=torch.tensor(rows).reshape(-1, 2),
            evidence=torch.from_numpy(np.array(evidence, bool).reshape(len(rows), v)),
            spans=spans,
        )


WAYS = {"blind": 0.03, "full": 0.14, "random": 0.27, "even": 0.38, "evidence": 0.18}
"""How often tokens are dropped in which way."""


def drop(
    batch: Sequence[list[Asked]], units: Sequence[np.ndarray], way: str, share: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Which cells each prompt of the batch keeps: the same number in every prompt.

    units: for each prompt the unit of each cell, [pictures * PATCHES], -1 where none; distinct over its pictures.
    share: in 0..1, how much is kept where the way leaves that open.

    - blind: none. full: all. random: a uniform share.
    - even: the same number of cells of every unit, then cells of no unit. A reader that has only seen random shares
      counts by area; this one has to count things.
    - evidence: one or a few cells of each group of some questions' evidence, then random ones.
    """
    n = len(units[0])
    if way == "blind":
        return [np.arange(0)] * len(batch)
    if way == "full":
        return [np.arange(n)] * len(batch)
    scores = [rng.random(n) for _ in batch]
    if way == "even" and all((u >= 0).any() for u in units):
        each = int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))
        for score, unit in zip(scores, units, strict=True):
            score += 4.0 * ((unit >= 0) & (_turn(unit, score) < each)) + 2.0 * (unit < 0)
        k = min(n, max(int((score > 4).sum()) for score in scores) + int(0.1 * share * n))
    else:
        low = 0.03 if way == "evidence" else 0.06
        k = max(8, round(n * low * (0.8 / low) ** share))
        if way == "evidence":
            each = int(rng.integers(1, 4))
            for score, questions in zip(scores, batch, strict=True):
                for i in rng.permutation(len(questions))[: int(rng.integers(1, 6))]:
                    for cells in questions[i].groups:
                        score[rng.permutation(cells)[:each]] += 2.0
    return [np.sort(np.argpartition(-score, k - 1)[:k]) for score in scores]


def _turn(unit: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Rank of each cell among the cells of its unit, by random score."""
    order = np.lexsort((score, unit))
    sorted_units = unit[order]
    first = np.r_[True, sorted_units[1:] != sorted_units[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(unit)), 0))
    turn = np.empty(len(unit), int)
    turn[order] = np.arange(len(unit)) - start
    return turn
