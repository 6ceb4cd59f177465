"""Questions whose evidence is spread over many things of one to four boards, each with its answer and its evidence.

| family | asks | evidence |
|---|---|---|
| half | are there more red things left or right? | every red thing |
| colours | are there more red or blue letters? | every red and every blue letter |
| classes | are there more cats or dogs? | every cat and every dog |
| corner | where are most red things? (top left) | every red thing |
| common | what colour are most letters? | every letter |
| most | which icon is there most? | every icon |
| single | which colour has one letter? | every letter |
| extreme | what is the largest number? | every number |
| holder | what colour is the largest number? | every number |
| pictures | which picture has the most cats? | every cat of every picture |
| missing | which is not there: a, k, m? | one of each that is there |
| count | how many letters are red? | every red letter |
| string | read the red sign. | every character of the sign |
| both | which letter is in both pictures? | that letter, once in each |
| where | which picture has a cat? | that cat |
| present | which is there: a, k, m? | the one that is there |
| nowhere | which is not in the pictures: a, k, m? | one of each that is there, in any picture |
| overall | what colour are most letters in the pictures? | every letter of every picture |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lab_vlm import art
from lab_vlm.questions import article, plural

from .boards import COLOURS, GRID, LETTERS, Facts

CORNERS = ("top left", "top right", "bottom left", "bottom right")
ORDINALS = ("first", "second", "third", "fourth")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PATCHES = GRID * GRID

Group = list[tuple[int, int]]
"""Units of evidence, (picture, unit), of which one is enough."""


@dataclass
class Question:
    family: str
    kind: str
    question: str
    answer: str
    evidence: list[Group]
    choices: tuple[str, ...] = ()


@dataclass
class Things:
    """A board's things as arrays, for questions."""

    facts: Facts
    kind: np.ndarray = field(init=False)
    name: np.ndarray = field(init=False)
    colour: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        table = np.array(self.facts.things, dtype=object).reshape(-1, 3)
        self.kind, self.name, self.colour = table.T
        # A sign is read, and never compared or counted.
        self.single = self.kind != "sign"

    def __len__(self) -> int:
        return len(self.kind)


Filter = tuple[str, str]
"""A word for some of the things, as the question puts it, and what it is: a colour, a kind, a class."""


def chosen(things: Things, wanted: Filter) -> np.ndarray:
    """Which things the filter means, [things] bool."""
    what, value = wanted
    column = {"colour": things.colour, "kind": things.kind, "name": things.name}[what]
    return things.single & (column == value)


def words(wanted: Filter) -> str:
    """The filter in the plural: red things, letters, cats."""
    what, value = wanted
    if what == "colour":
        return f"{value} things"
    return plural(value) if value in art.CLASSES or what == "kind" else value


def _filters(things: Sequence[Things], rng: np.random.Generator) -> list[Filter]:
    """Everything that can be counted on these boards, in a random order; colours come up most."""
    names = {n for t in things for n in t.name[t.kind == "icon"]}
    colours = {c for t in things for c in t.colour[t.single]}
    kinds = ("icon", "letter", "number")
    every = [("colour", str(c)) for c in sorted(colours)] * 2
    every += [("name", str(n)) for n in sorted(names)] + [("kind", k) for k in kinds]
    return list(dict.fromkeys(every[i] for i in rng.permutation(len(every))))


def _groups(picture: int, mask: np.ndarray) -> list[Group]:
    return [[(picture, int(i))] for i in np.flatnonzero(mask)]


LEAST = 2
"""A comparison's winner is ahead by this many things at least."""
MOST = 14
"""Things that are evidence, at most, in one picture: 6 % of a picture's tokens can hold one token of each."""


def half(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    x, y = t.facts.centre.T - 64
    for wanted in _filters([t], rng):
        mask = chosen(t, wanted)
        if not 4 <= mask.sum() <= MOST:
            continue
        for axis, sides in ((x, ("left", "right")), (y, ("top", "bottom")))[:: 1 if rng.random() < 0.5 else -1]:
            first, second = int((axis[mask] < 0).sum()), int((axis[mask] > 0).sum())
            if abs(first - second) >= LEAST:
                text = f"are there more {words(wanted)} {sides[0]} or {sides[1]}?"
                return Question("half", wanted[0], text, sides[int(second > first)], _groups(p, mask))
    return None


def _of_kind(t: Things, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """All things, or the things of one kind: (word, mask)."""
    kind = str(rng.choice(("thing", "icon", "letter", "number"), p=(0.4, 0.2, 0.2, 0.2)))
    return f"{kind}s", t.single if kind == "thing" else t.single & (t.kind == kind)


def colours(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    word, base = _of_kind(t, rng)
    counts = {c: int((base & (t.colour == c)).sum()) for c in COLOURS}
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b and min(counts[a], counts[b]) >= 1]
    pairs = [(a, b) for a, b in pairs if abs(counts[a] - counts[b]) >= LEAST and 5 <= counts[a] + counts[b] <= MOST]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    mask = base & ((t.colour == a) | (t.colour == b))
    text = f"are there more {a} or {b} {word}?"
    return Question("colours", word, text, a if counts[a] > counts[b] else b, _groups(p, mask))


def classes(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    kind = "icon" if rng.random() < 0.6 else "letter"
    counts = {n: int((t.name == n).sum()) for n in t.name[t.kind == kind]}
    pairs = [(a, b) for a in sorted(counts) for b in sorted(counts) if abs(counts[a] - counts[b]) >= LEAST]
    pairs = [(a, b) for a, b in pairs if 4 <= counts[a] + counts[b] <= MOST]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    mask = (t.kind == kind) & ((t.name == a) | (t.name == b))
    shown = (plural(a), plural(b)) if kind == "icon" else (a, b)
    text = f"are there more {shown[0]} or {shown[1]}?"
    return Question("classes", kind, text, a if counts[a] > counts[b] else b, _groups(p, mask))


def corner(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    right, low = (t.facts.centre > 64).T
    place = 2 * low + right
    for wanted in _filters([t], rng):
        mask = chosen(t, wanted)
        counts = np.bincount(place[mask], minlength=4)
        second, first = np.sort(counts)[-2:]
        if 5 <= mask.sum() <= MOST and first - second >= LEAST:
            text = f"where are most {words(wanted)}?"
            return Question("corner", wanted[0], text, CORNERS[int(counts.argmax())], _groups(p, mask))
    return None


def most(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    kind = "icon" if rng.random() < 0.6 else "letter"
    mask = t.kind == kind
    counts = Counter(t.name[mask]).most_common(2)
    if not 5 <= mask.sum() <= MOST or len(counts) < 2 or counts[0][1] - counts[1][1] < LEAST:
        return None
    return Question("most", kind, f"which {kind} is there most?", counts[0][0], _groups(p, mask))


def single(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    word, mask = _of_kind(t, rng)
    counts = Counter(t.colour[mask])
    alone = [colour for colour, count in counts.items() if count == 1]
    if not 5 <= mask.sum() <= MOST or len(alone) != 1:
        return None
    return Question("single", word, f"which colour has one {word[:-1]}?", alone[0], _groups(p, mask))


def holder(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    mask = t.kind == "number"
    word, best = (("largest", max), ("smallest", min))[int(rng.random() < 0.5)]
    if not 4 <= mask.sum() <= MOST:
        return None
    colours_of_it = {*t.colour[mask & (t.name == best(t.name[mask]))]}
    if len(colours_of_it) != 1:
        return None
    return Question("holder", word, f"what colour is the {word} number?", colours_of_it.pop(), _groups(p, mask))


def extreme(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    mask = t.kind == "number"
    if not 4 <= mask.sum() <= MOST:
        return None
    word, best = (("largest", max), ("smallest", min))[int(rng.random() < 0.5)]
    answer = best(t.name[mask])
    return Question("extreme", word, f"what is the {word} number?", answer, _groups(p, mask))


def common(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    word, mask = _of_kind(t, rng)
    if word == "things" or rng.random() < 0.3:
        names = sorted({n for n in t.name[t.kind == "icon"] if (t.name == n).sum() >= 5})
        if not names:
            return None
        name = names[rng.integers(len(names))]
        word, mask = plural(name), (t.kind == "icon") & (t.name == name)
    counts = sorted(((int((mask & (t.colour == c)).sum()), c) for c in COLOURS), reverse=True)
    if not 5 <= mask.sum() <= MOST or counts[0][0] - counts[1][0] < LEAST:
        return None
    return Question("common", word, f"what colour are most {word}?", counts[0][1], _groups(p, mask))


def _named(boards: Sequence[Things], rng: np.random.Generator) -> tuple[str, list[str], list[str]]:
    """A kind of thing, and its names in a random order: those on some board, and those on none."""
    kind = "letter" if rng.random() < 0.6 else "icon"
    shown = {str(n) for t in boards for n in t.name[t.kind == kind]}
    # A letter on a sign is there too: leave it out of both.
    written = {c for t in boards for name in t.name[t.kind == "sign"] for c in name}
    pool = [str(n) for n in (LETTERS if kind == "letter" else art.CLASSES) if n not in written]
    pool = [pool[i] for i in rng.permutation(len(pool))]
    return kind, [n for n in pool if n in shown], [n for n in pool if n not in shown]


def _shuffled(names: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(names[i] for i in rng.permutation(len(names)))


def _copies(boards: Sequence[tuple[int, Things]], kind: str, name: str) -> Group:
    """Every thing of this name, on boards that are given with their number."""
    return [(p, int(i)) for p, t in boards for i in np.flatnonzero((t.kind == kind) & (t.name == name))]


def missing(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    kind, there, absent = _named([t], rng)
    size = int(rng.integers(2, 6))
    if len(there) < size or not absent:
        return None
    options = _shuffled([*there[:size], absent[0]], rng)
    evidence = [_copies([(p, t)], kind, name) for name in there[:size]]
    return Question("missing", kind, f"which is not there: {', '.join(options)}?", absent[0], evidence, options)


def present(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    kind, there, absent = _named([t], rng)
    size = int(rng.integers(2, 6))
    if not there or len(absent) < size:
        return None
    options = _shuffled([there[0], *absent[:size]], rng)
    evidence = [_copies([(p, t)], kind, there[0])]
    return Question("present", kind, f"which is there: {', '.join(options)}?", there[0], evidence, options)


def count(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    word, base = _of_kind(t, rng)
    numbers = {c: int((base & (t.colour == c)).sum()) for c in COLOURS}
    # Any number as often as any other, as far as the board has it.
    wanted = sorted({n for n in numbers.values() if 1 <= n <= 9})
    if not wanted:
        return None
    number = wanted[rng.integers(len(wanted))]
    colour = str(rng.choice([c for c, n in numbers.items() if n == number]))
    text = f"how many {word} are {colour}?"
    return Question("count", word, text, NUMBERS[number], _groups(p, base & (t.colour == colour)))


def string(p: int, t: Things, rng: np.random.Generator) -> Question | None:
    signs = np.flatnonzero(t.kind == "sign")
    if not len(signs):
        return None
    i = int(signs[rng.integers(len(signs))])
    # Characters are numbered after the things, sign by sign.
    first = len(t) + sum(len(t.name[s]) for s in signs if s < i)
    evidence = [[(p, first + j)] for j in range(len(t.name[i]))]
    return Question("string", "sign", f"read the {t.colour[i]} sign.", t.name[i], evidence)


OF_ONE: dict[str, Callable[[int, Things, np.random.Generator], Question | None]] = {
    "half": half,
    "colours": colours,
    "classes": classes,
    "corner": corner,
    "common": common,
    "most": most,
    "single": single,
    "extreme": extreme,
    "holder": holder,
    "missing": missing,
    "present": present,
    "count": count,
    "string": string,
}
"""Families about one picture of the prompt."""
ALONE = ("half", "corner", "common", "most", "single", "extreme", "holder", "count", "string")
"""Those of them that are asked only where the prompt has no other picture.

About the second of two pictures or the third of four, the reader was right in 15 to 40 % after 1.1 million questions;
in `common`, in 57 to 68 % after 1.4 million.
"""


def pictures(boards: Sequence[Things], rng: np.random.Generator) -> Question | None:
    for wanted in _filters(boards, rng):
        masks = [chosen(t, wanted) for t in boards]
        numbers = [int(mask.sum()) for mask in masks]
        best = sorted(numbers)[::-1]
        if MOST >= best[0] >= best[1] + LEAST and best[1] >= 1:
            evidence = [group for p, mask in enumerate(masks) for group in _groups(p, mask)]
            text = f"which picture has the most {words(wanted)}?"
            return Question("pictures", wanted[0], text, ORDINALS[int(np.argmax(numbers))], evidence)
    return None


def both(boards: Sequence[Things], rng: np.random.Generator) -> Question | None:
    if len(boards) != 2:
        return None
    letters = [{str(n) for n in t.name[t.kind == "letter"]} for t in boards]
    shared = letters[0] & letters[1]
    if len(shared) != 1 or any(shared & set(name) for t in boards for name in t.name[t.kind == "sign"]):
        return None
    letter = shared.pop()
    evidence = [
        [(p, int(i)) for i in np.flatnonzero((t.kind == "letter") & (t.name == letter))] for p, t in enumerate(boards)
    ]
    return Question("both", "letter", "which letter is in both pictures?", letter, evidence)


def where(boards: Sequence[Things], rng: np.random.Generator) -> Question | None:
    """Which picture has what only one of them has.

    Also a stepping stone: before pictures can be compared, their tokens must be told apart; from "which picture has the
    most cats?" alone, that had not begun after 240,000 questions.
    """
    names = [{(str(k), str(n)) for k, n in zip(t.kind, t.name, strict=True) if k in ("icon", "letter")} for t in boards]
    only = [
        (p, *found) for p, own in enumerate(names) for found in sorted(own - set().union(*names[:p], *names[p + 1 :]))
    ]
    if not only:
        return None
    picture, kind, name = only[rng.integers(len(only))]
    shown = article(name) if kind == "icon" else f"the letter {name}"
    evidence = [[(picture, int(i)) for i in np.flatnonzero(boards[picture].name == name)]]
    return Question("where", kind, f"which picture has {shown}?", ORDINALS[picture], evidence)


def nowhere(boards: Sequence[Things], rng: np.random.Generator) -> Question | None:
    kind, there, absent = _named(boards, rng)
    size = int(rng.integers(3, 6))
    if len(there) < size or not absent:
        return None
    options = _shuffled([*there[:size], absent[0]], rng)
    evidence = [_copies([*enumerate(boards)], kind, name) for name in there[:size]]
    text = f"which is not in the pictures: {', '.join(options)}?"
    return Question("nowhere", kind, text, absent[0], evidence, options)


def overall(boards: Sequence[Things], rng: np.random.Generator) -> Question | None:
    kind = ("icon", "letter", "number")[rng.integers(3)]
    masks = [t.kind == kind for t in boards]
    counts = Counter(colour for t, mask in zip(boards, masks, strict=True) for colour in t.colour[mask]).most_common(2)
    if len(counts) < 2 or counts[0][1] - counts[1][1] < LEAST or max(mask.sum() for mask in masks) > MOST:
        return None
    evidence = [group for p, mask in enumerate(masks) for group in _groups(p, mask)]
    return Question("overall", kind, f"what colour are most {kind}s in the pictures?", counts[0][0], evidence)


OF_SEVERAL: dict[str, Callable[[Sequence[Things], np.random.Generator], Question | None]] = {
    "pictures": pictures,
    "both": both,
    "where": where,
    "nowhere": nowhere,
    "overall": overall,
}
"""Families about all pictures of the prompt."""

FAMILIES = (*OF_ONE, *OF_SEVERAL)


def families_of(pictures: int) -> list[str]:
    """What can be asked about a prompt with so many pictures."""
    return [*OF_ONE] if pictures == 1 else [*(family for family in OF_ONE if family not in ALONE), *OF_SEVERAL]


def ask(boards: Sequence[Things], family: str, rng: np.random.Generator) -> Question | None:
    """A random question of `family` about a prompt's boards, or None where they give none."""
    if family not in families_of(len(boards)):
        return None
    if family in OF_SEVERAL:
        return OF_SEVERAL[family](boards, rng)
    picture = int(rng.integers(len(boards)))
    question = OF_ONE[family](picture, boards[picture], rng)
    if question is not None and len(boards) > 1:
        question.question = f"in the {ORDINALS[picture]} picture, {question.question}"
    return question


def order(question: Question, boards: Sequence[Facts]) -> list[int]:
    """The evidence as cells of the pictures one after another, best first: one cell of each group, then the rest.

    The first pass takes the first unit's middle cell in every group; later passes the units that are left, then the
    cells that are left. Cells of picture p are numbered from p * PATCHES.
    """
    queues: list[list[int]] = []
    for group in question.evidence:
        cells = [_middle_first(np.flatnonzero(boards[p].units == unit)) + p * PATCHES for p, unit in group]
        turns = max((len(c) for c in cells), default=0)
        queues.append([int(c[i]) for i in range(turns) for c in cells if i < len(c)])
    longest = max((len(q) for q in queues), default=0)
    return [q[i] for i in range(longest) for q in queues if i < len(q)]


def _middle_first(cells: np.ndarray) -> np.ndarray:
    """Cells of one unit, the nearest to their mean first."""
    where = np.stack([cells // GRID, cells % GRID], 1).astype(float)
    return cells[np.argsort(((where - where.mean(0)) ** 2).sum(1), kind="stable")] if len(cells) else cells
