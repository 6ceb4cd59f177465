"""Six families of questions about a scene, each with its answer and the patches that hold the evidence.

The families mirror, and are named after, what six public benchmarks ask: existence (POPE), perception (MME),
science (ScienceQA), diagram (AI2D), reading (OCRBench) and text (TextVQA). Lab scores are never comparable with
published ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import art
from .scenes import DEVICES, GRID, Scene

FAMILIES = ("existence", "perception", "science", "diagram", "reading", "text")
NUMBERS = ("zero", "one", "two", "three", "four")
_DEVICE_QUESTIONS = {
    "beaker": "what is in the beaker?",
    "magnet": "where does the magnet point?",
    "thermometer": "how warm is the thermometer?",
    "circuit": "what is missing in the circuit?",
}


@dataclass
class Question:
    family: str
    kind: str
    question: str
    answer: str
    evidence: np.ndarray  # share of each patch covered by the evidence, [GRID * GRID] in 0..1
    choices: tuple[str, ...] = ()
    pair: int = -1  # perception: the yes and the no question about one fact share a number


def plural(name: str) -> str:
    return name + ("es" if name.endswith(("s", "sh", "x")) else "s")


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def ask(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    """Every question the generator can ask about `scene` (yes and no balanced within existence and perception)."""
    return [q for make in (_existence, _perception, _science, _diagram, _reading) for q in make(scene, split, rng)]


def _icons(scene: Scene) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, thing in enumerate(scene.things):
        if thing.kind == "icon":
            found.setdefault(thing.name, []).append(i)
    return found


def _existence(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    present = _icons(scene)
    absent = [c for c in art.classes(split) if c not in present]
    by_frequency = sorted(absent, key=lambda c: -_popularity(split)[c])
    questions = []
    for i, (name, where) in enumerate(present.items()):
        questions.append(Question("existence", "present", f"is there {article(name)}?", "yes", scene.evidence(where)))
        kind = ("random", "popular", "adversarial")[i % 3]
        kin = [c for c in absent if art.CATEGORY_OF[c] == art.CATEGORY_OF[name]]
        pool = {"random": absent, "popular": by_frequency[:6], "adversarial": kin or absent}[kind]
        wrong = pool[rng.integers(len(pool))]
        questions.append(Question("existence", kind, f"is there {article(wrong)}?", "no", np.zeros(GRID * GRID)))
    return questions


def _popularity(split: str) -> dict[str, float]:
    """How often the composer draws each class (its weights, see scenes.Composer)."""
    names = list(art.classes(split))
    weights = np.linspace(2.0, 0.6, len(names))[np.random.default_rng(7).permutation(len(names))]
    return dict(zip(names, weights.tolist(), strict=True))


def _perception(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    questions: list[Question] = []

    def both(kind: str, true: str, false: str, where: list[int]) -> None:
        pair = len(questions) // 2
        for text, answer in ((true, "yes"), (false, "no")):
            questions.append(Question("perception", kind, text, answer, scene.evidence(where), pair=pair))

    for name, where in _icons(scene).items():
        if len(where) in (2, 3):  # two or three, either way round: the number asked for says nothing
            true, false = (f"{NUMBERS[n]} {plural(name)}" for n in (len(where), 5 - len(where)))
            both("count", f"do you see {true}?", f"do you see {false}?", where)
        if len(where) > 1:
            continue
        thing = scene.things[where[0]]
        colour = [c for c in art.COLOURS if c != thing.colour][rng.integers(len(art.COLOURS) - 1)]
        both("colour", f"is the {name} {thing.colour}?", f"is the {name} {colour}?", where)
        if thing.big >= 0:
            words = ("small", "big")
            both("size", f"is the {name} {words[thing.big]}?", f"is the {name} {words[1 - thing.big]}?", where)
        x, y = (thing.box[0] + thing.box[2]) / 2 - 64, (thing.box[1] + thing.box[3]) / 2 - 64
        axis, words = (x, ("left", "right")) if rng.random() < 0.5 else (y, ("top", "bottom"))
        if abs(axis) > 10:
            side = int(axis > 0)
            both("position", f"is the {name} at the {words[side]}?", f"is the {name} at the {words[1 - side]}?", where)
    return questions


def _choose(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[str, ...]:
    """Four shuffled choices: the right one and the first three wrong ones."""
    options = [right, *wrong[:3]]
    return tuple(options[i] for i in rng.permutation(len(options)))


def _science(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    questions = []
    seen = list(_icons(scene))
    everything = art.classes(split)
    eaters = tuple(c for c in art.CATEGORIES["animal"] if c in everything)  # all choices could be right: look

    def add(kind: str, text: str, answer: str, choices: tuple[str, ...], where: list[int]) -> None:
        full = f"{text} choose: {', '.join(choices)}."
        questions.append(Question("science", kind, full, answer, scene.evidence(where), choices))

    def lures(right: str, not_these: tuple[str, ...], pool: tuple[str, ...]) -> list[str]:
        """Wrong choices from `pool`, two that are in the picture first."""
        inside = [n for n in seen if n in pool and n not in (right, *not_these)]
        outside = [n for n in pool if n not in seen]
        return [str(n) for n in (*rng.permutation(inside)[:2], *rng.permutation(outside)[:3])]

    for i, thing in enumerate(scene.things):
        if thing.kind == "device":
            options = tuple(str(s) for s in rng.permutation(DEVICES[thing.name]))
            add(thing.name, _DEVICE_QUESTIONS[thing.name], thing.state, options, [i])
        elif thing.kind == "chain":
            eaten, eater = scene.things[thing.owner].name, scene.things[thing.arrow_to].name
            where = [thing.owner, thing.arrow_to, i]
            add("food", f"what eats the {eaten}?", eater, _choose(rng, eater, lures(eater, (eaten,), eaters)), where)
        elif thing.kind == "group":
            name = scene.things[thing.owner].name
            add(
                "sorting",
                f"what is in group {thing.name}?",
                name,
                _choose(rng, name, lures(name, (), everything)),
                [thing.owner, i],
            )
    return questions


def _diagram(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    questions = []
    for i, thing in enumerate(scene.things):
        if thing.kind == "label":
            target = scene.things[thing.arrow_to].name
            where = scene.evidence([i, thing.arrow_to])
            questions.append(Question("diagram", "label", f"what does {thing.name} point to?", target, where))
        elif thing.kind in ("chain", "arrow"):
            first, second = scene.things[thing.owner].name, scene.things[thing.arrow_to].name
            where = scene.evidence([i, thing.owner, thing.arrow_to])
            questions.append(Question("diagram", "after", f"what comes after the {first}?", second, where))
            questions.append(Question("diagram", "before", f"what comes before the {second}?", first, where))
    return questions


def _reading(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    """Both text families: what a sign, word or number says, and what is written next to something."""
    questions = []
    for i, thing in enumerate(scene.things):
        if thing.kind in ("word", "number"):
            questions.append(
                Question("reading", thing.kind, f"read the {thing.kind}.", thing.text, scene.evidence([i]))
            )
        elif thing.kind == "sign":
            text = f"read the {thing.colour} sign."
            questions.append(Question("reading", "sign", text, thing.text, scene.evidence([i])))
            where = scene.evidence([i, thing.owner])
            text = f"what is written next to the {thing.name}?"
            questions.append(Question("text", "next", text, thing.text, where))
    return questions


def family_counts(questions: list[Question]) -> Counter[str]:
    return Counter(q.family for q in questions)
