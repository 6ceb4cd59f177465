"""A comparison as pictures and words, for any page: nothing here knows Gradio."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from gripvlm.demo.compare import Answered, Comparison
from gripvlm.report import Part, overlay

__all__ = ["Sheet", "described", "sheet", "why"]

GAP = 6  # pixels between the parts of a picture


class Sheet(NamedTuple):
    """One picture of what a method kept: the parts of a prompt's images (tiles and the like) under one another.

    Attributes:
        image: RGB.
        places: of each part, and the pixels that it begins below the top and is enlarged by.
    """

    image: Image.Image
    places: list[tuple[Part, int, float]]

    def token_at(self, x: float, y: float) -> int | None:
        """Which of the prompt's visual tokens a pixel shows; None beside all of them."""
        for part, top, factor in self.places:
            at_x, at_y = x / factor, (y - top) / factor
            for number, (left, above, right, below) in enumerate(part.geometry.boxes):
                if left <= at_x < right and above <= at_y < below and 0 <= at_y < part.geometry.image_size[1]:
                    return part.start + number
        return None


def sheet(comparison: Comparison, answered: Answered) -> Sheet | None:
    """The picture of what was kept; None where the tokens' places are not known (`Comparison.no_picture`)."""
    if not comparison.parts:
        return None
    drawn = [
        overlay(comparison.images[part.image], part.of(answered.selections), part.geometry, caption="")
        for part in comparison.parts
    ]
    height = sum(one.height + GAP for one in drawn) - GAP
    whole = Image.new("RGB", (max(one.width for one in drawn), height), "white")
    places, top = [], 0
    for part, one in zip(comparison.parts, drawn, strict=True):
        whole.paste(one, (0, top))
        places.append((part, top, one.width / part.geometry.image_size[0]))
        top += one.height + GAP
    return Sheet(whole, places)


def described(comparison: Comparison, answered: Answered) -> list[str]:
    """What a card says below its picture, line by line: the answer first."""
    full = comparison.full
    lines = [answered.text or "(nothing)", f"probability {percent(answered.probability)}"]
    if answered.ids != full.ids:
        lines.append(f"“{full.text}”, the answer with all tokens: {percent(answered.of_full)}")
    total = sum(selection.n for selection in answered.selections)
    lines.append(f"{answered.paid:g} of {total} visual tokens")
    times = {name: 1000 * seconds for name, seconds in answered.seconds.items()}
    parts = ", ".join(f"{name} {milliseconds:.0f}" for name, milliseconds in times.items() if milliseconds >= 0.5)
    return [*lines, f"{sum(times.values()):.0f} ms ({parts})"]


def why(comparison: Comparison, answered: Answered, token: int, worth: float | None) -> str:
    """Why a token stayed or went: its score, and what the answer loses without it.

    Args:
        token: its number among the prompt's visual tokens.
        worth: as `Asker.worth` says; None where it cannot be asked.
    """
    kept, scores, full = answered.kept[token], answered.scores, comparison.full
    parts = [f"{answered.method} {'kept' if kept else 'dropped'} token {token + 1} of {len(answered.kept)}."]
    if scores is None:
        parts.append("The method has no scores.")
    else:
        # ties go to the lower index, as in `top_k`
        rank = 1 + sum(s > scores[token] or (s == scores[token] and i < token) for i, s in enumerate(scores))
        parts.append(f"Score {scores[token]:.3g}, rank {rank}.")
    if worth is None:
        return " ".join([*parts, f"What it is worth cannot be asked: {answered.alone}."])
    base = answered.of_full
    other = min(1.0, max(0.0, base - worth if kept else base + worth))
    change = f"“{full.text}” has probability {percent(base)}; {'without' if kept else 'with'} it {percent(other)}."
    return " ".join([*parts, change])


def percent(probability: float) -> str:
    """`69.2 %`"""
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "below 0.1 %"
