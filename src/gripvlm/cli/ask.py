"""`gripvlm ask`: one question about one picture or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from gripvlm.budget import Budget
from gripvlm.cli.commands import BUDGETS, Device, Model, Positions, console, split_pruners
from gripvlm.cli.outputs import checked_picture
from gripvlm.errors import GripError

if TYPE_CHECKING:
    from gripvlm.pruners.base import Pruner


def ask_command(
    image: Annotated[
        list[Path], typer.Option("--image", "-i", help="A picture; once for each of several, in their order.")
    ],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about them.")],
    model: Model = "lab",
    pruner: Annotated[str, typer.Option("--pruner", "-p", help="A name from `gripvlm list`.")] = "divprune",
    keep: Annotated[str | None, typer.Option("--keep", "-k", help=f"{BUDGETS}; by default 10%, with full all.")] = None,
    overlay: Annotated[
        Path | None, typer.Option(dir_okay=False, writable=True, help="File for a picture of the kept tokens (.png).")
    ] = None,
    positions: Positions = "original",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    device: Device = None,
) -> None:
    """Ask one question about one picture, or several, with fewer visual tokens."""
    # Cheap checks first: the imports below take seconds, the model perhaps minutes.
    if not question.strip():
        raise GripError("the question is empty: type --question 'what is in the picture?'")
    if any(path.parts[:1] in (("http:",), ("https:",)) for path in image):
        raise GripError("--image takes a file: download the picture first, then type its path")
    chosen, budget = _pruner_and_budget(pruner, keep)

    from gripvlm.tasks import open_image

    pictures = [open_image(path) for path in image]
    if overlay is not None:
        checked_picture(overlay, image)

    from gripvlm.api import encode
    from gripvlm.eval import answer, make_inputs, question_ids
    from gripvlm.models.loading import load_model, quiet
    from gripvlm.report import layout_of_images
    from gripvlm.report import overlay as draw

    quiet()
    vlm, processor = load_model(model, device)
    inputs = make_inputs(vlm, processor, [question], [pictures])
    encoded = encode(vlm, inputs, [chosen])
    # before the answer: an unknown layout is refused before the model runs
    drawings = {}
    if overlay is not None:
        grids = [item.grid or item.rasters for item in encoded.samples[0]]
        tokens = [item.features.shape[0] for item in encoded.samples[0]]
        for part in layout_of_images(processor, [picture.size for picture in pictures], grids, tokens):
            path = overlay.with_stem(f"{overlay.stem}-{part.name.replace(' ', '-')}") if part.name else overlay
            checked_picture(path, image)
            drawings[path] = part
    outcome = answer(
        vlm,
        processor,
        inputs,
        chosen,
        budget,
        max_new_tokens=max_new_tokens,
        positions=positions,
        question=question_ids(processor, [question]),
        encoded=encoded,
    )
    text, selections, screen = outcome.predictions[0], outcome.selections[0], console()
    # Inside the language model the count is an average over its layers, so not always a whole number.
    kept, total = round(sum(s.paid for s in selections), 1), sum(s.n for s in selections)
    screen.print(escape(text or "(an empty answer)"), style="bold")
    screen.print(f"{kept:g} of {total} visual tokens kept ({100 * kept / total:.1f} %) by {escape(chosen.name)}")
    if any(s.layers for s in selections):
        layers = [sum(counts) for counts in zip(*(s.counts for s in selections), strict=True)]
        screen.print(f"that is the average over {len(layers)} layers, which see {', '.join(map(str, layers))}")
    times = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in outcome.seconds.items())
    screen.print(f"milliseconds: {times}", style="dim")
    for path, part in drawings.items():  # several pictures, tiles and the like: a drawing each
        caption = f"{question}\n{text}  |  {kept:g} of {total} tokens, {chosen.name}"
        draw(pictures[part.image], part.of(selections), part.geometry, path, caption)
        screen.print(f"picture of the kept tokens: {escape(str(path))}", soft_wrap=True)


def _pruner_and_budget(text: str, keep: str | None) -> tuple[Pruner, Budget]:
    """The pruner of a name or spec, and the budget: by default a tenth; for `full`, all tokens."""
    budget = None if keep is None else Budget(keep)

    from gripvlm.pruners import get_pruner
    from gripvlm.pruners.baselines.keep_all import KeepAll

    names = split_pruners(text) if text.strip(", ") else [text]
    if len(names) > 1:
        raise GripError(f"--pruner {text}: type one name; `gripvlm eval --pruners {text}` compares several")
    pruner = get_pruner(names[0])
    if not isinstance(pruner, KeepAll):
        return pruner, budget or Budget(0.1)
    if budget is not None and budget.is_fraction and budget.value < 1:
        raise pruner.refused(f"--keep {keep}")
    return pruner, budget or Budget(1.0)
