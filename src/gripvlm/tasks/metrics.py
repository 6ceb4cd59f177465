"""Scores of one answer by the rules that benchmarks publish; each takes a prediction and the accepted answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from gripvlm.tasks.base import Sample, TaskError, default_score, named_choice, normalise
from gripvlm.tasks.vqa_answer import vqa_accuracy

Metric: TypeAlias = Callable[[str, Sample], float]

_LETTER_ALONE = re.compile(r"\(?\s*([A-Za-z])\s*[).:,]*")
_LETTER_FIRST = re.compile(r"\(?([A-Z])(?:[.:]|\))")
_LETTER_IN_SENTENCE = re.compile(r"[Tt]he answer is:? \(?([A-Z])\b")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def pope_answer(prediction: str) -> str:
    """ "no" where the first sentence has the word No, no or not, else "yes": any other answer counts as yes.

    Source: evaluate.py of RUCAIBox/POPE (arXiv 2305.10355), also LLaVA's eval_pope.py: the text up to the first period,
    without commas, cut at spaces. Departures: (1) cut at any white space.
    """
    words = prediction.partition(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_answer(prediction: str) -> str | None:
    """ "yes" or "no" as MME's calculation.py reads them (arXiv 2306.13394), None for anything else.

    The whole answer without periods is yes, no, y or n, or one of the two words lies in its first four letters.
    """
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def option_letter(prediction: str, count: int) -> str | None:
    """The letter of the option that is named, "A" for the first of `count`; None where none is.

    Read in this order: nothing but a letter, in any case, with or without brackets or a mark; a capital with a period,
    colon or bracket at the start ("B. cat"); "The answer is B".

    Source: LLaVA's eval_science_qa.py and lmms-eval's scienceqa and ai2d. Departures: (1) one rule for both; (2) "(B)"
    and "B:" are read like "B."; (3) a letter beyond the options is no answer.
    """
    text = prediction.strip()
    match = _LETTER_ALONE.fullmatch(text) or _LETTER_FIRST.match(text) or _LETTER_IN_SENTENCE.search(text)
    letter = match.group(1).upper() if match else ""
    return letter if letter and ord(letter) - ord("A") < count else None


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals one of the answers, both after `normalise`."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where one of the answers occurs anywhere in the prediction, without regard to case.

    Line breaks are spaces, full-width letters count as their ASCII ones.

    Source: OCRBench (arXiv 2305.07895, example.py); full-width letters as in lmms-eval since 0.7.
    """
    texts = [text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ") for text in (prediction, *answers)]
    return float(any(answer in texts[0] for answer in texts[1:]))


def contains_verbatim(prediction: str, answers: Sequence[str]) -> float:
    """As `contains`, but case counts and spaces don't: OCRBench's rule for the formulas of HME100k."""
    texts = [text.strip().replace("\n", "").replace(" ", "") for text in (prediction, *answers)]
    return float(any(answer in texts[0] for answer in texts[1:]))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """The best of 1 - NL over the answers; 0 where NL, the normalised edit distance, is `threshold` or more.

    NL is the Levenshtein distance over the longer length, both texts lower-case and stripped.

    Source: average normalised Levenshtein similarity (arXiv 1905.13648, equation 1), as DocVQA uses it.
    """
    distances = []
    for answer in answers:
        a, b = (" ".join(text.lower().split()) for text in (answer, prediction))
        distances.append(_levenshtein(a, b) / max(len(a), len(b), 1))
    return 1 - min(distances) if min(distances) < threshold else 0.0


def _levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn `a` into `b`."""
    # Two rows of the table are enough; a library for this would be one more dependency.
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


METRICS: Mapping[str, Metric] = {
    "choice": default_score,
    "exact": lambda prediction, sample: exact(prediction, sample.accepted),
    "vqa": lambda prediction, sample: vqa_accuracy(prediction, sample.accepted),
    "anls": lambda prediction, sample: anls(prediction, sample.accepted),
    "contains": lambda prediction, sample: contains(prediction, sample.accepted),
    "letter": lambda prediction, sample: float(
        option_letter(prediction, len(sample.choices) or 26) == sample.answer.strip().upper()
    ),
    "yes_no": lambda prediction, sample: float(named_choice(prediction, ("yes", "no")) == normalise(sample.answer)),
}
"""What `metric=` may name for questions of one's own."""


def get_metric(name: str) -> Metric:
    """A metric by name.

    Raises:
        TaskError: there is none of that name.
    """
    if name not in METRICS:
        raise TaskError(f"unknown metric {name!r}: type metric= with one of {', '.join(METRICS)}")
    return METRICS[name]


def yes_no_summary(predicted: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    """f1, precision and recall of "yes", and yes_share, the share of questions that are answered by yes.

    A quotient with nothing below is 0.
    """
    hits = sum(a and b for a, b in zip(predicted, true, strict=True))
    precision = hits / sum(predicted) if any(predicted) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    share = sum(predicted) / len(predicted) if predicted else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, "yes_share": share}


def pair_accuracy(groups: Iterable[Sequence[float]]) -> dict[str, float]:
    """{"accuracy_plus": the share of pairs whose two questions are both right} from the scores of each pair.

    Lone questions don't count; {} without any pair.
    """
    both = [min(scores) for scores in groups if len(scores) == 2]
    return {"accuracy_plus": sum(both) / len(both)} if both else {}
