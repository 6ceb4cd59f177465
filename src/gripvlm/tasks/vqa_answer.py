"""How VQA compares answers: the text normalisation of its evaluation server, and the ten-answer rule."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["vqa_accuracy", "vqa_normalise"]

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

# Written without one of its apostrophes, each of these gets it back.
_CONTRACTIONS = re.findall(
    r"\S+",
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've "
    "mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's "
    "won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've",
)
_WITHOUT = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}
# The published table has this one the wrong way round, and scores depend on it.
_WITHOUT["somebody'd"] = "somebodyd"


def vqa_normalise(answer: str) -> str:
    """An answer as VQA and TextVQA compare it.

    In this order: lower case; commas and question marks go, a possessive 's becomes a word; punctuation goes where
    the text has it beside a space, elsewhere it becomes a space; a period goes unless a digit follows; number words up
    to ten become digits ("none" is 0); the articles a, an, the go; contractions get their apostrophe back.

    Source: the answer processor of Pythia/MMF (facebookresearch/mmf), which TextVQA's server and lmms-eval use; it
    goes back to the VQA evaluation code (arXiv 1505.00468). Departures: (1) it takes out the first 32 periods only,
    by a misplaced argument; here all.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # Odd, but published: a mark that stands beside a space anywhere is removed everywhere.
    beside = {mark for mark in _MARKS if f"{mark} " in text or f" {mark}" in text}
    text = "".join("" if c in beside else " " if c in _MARKS else c for c in text)
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).split()]
    return " ".join(_WITHOUT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean, over each answer left out in turn, of min(1, matches among the others / 3).

    With ten answers of which m match: 0.3 for one, 0.6 for two, 0.9 for three, 1 for four or more.

    Args:
        prediction: the model's answer.
        answers: of all people who were asked, [10] in VQA and TextVQA.

    Source: VQA (arXiv 1505.00468, section 3) in the form of its evaluation code, averaged over 9-answer subsets.
    """
    text = vqa_normalise(prediction)
    matches = [vqa_normalise(answer) == text for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)
