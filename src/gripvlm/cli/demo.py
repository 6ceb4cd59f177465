"""`gripvlm demo`: methods side by side in a browser, and the same as a gallery in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gripvlm.budget import Budget
from gripvlm.cli.commands import Device, Model, console, split_names, split_pruners
from gripvlm.cli.outputs import checked_folder
from gripvlm.errors import GripError

OF_LAB, OF_OTHERS = "grip,cdpruner,divprune,random", "cdpruner,divprune,random"
GALLERY = "The gallery"


def demo_command(
    model: Model = "lab",
    pruners: Annotated[
        str | None,
        typer.Option(
            "--pruners",
            "-p",
            help=f"Names from `gripvlm list`; by default {OF_LAB}, and without grip for other models.",
        ),
    ] = None,
    keep: Annotated[str, typer.Option("--keep", "-k", help="Where the slider begins, such as 10%.")] = "10%",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 32,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    static: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Write a gallery to this folder and end: index.html, which needs no server.",
            rich_help_panel=GALLERY,
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="What to ask, as for `gripvlm eval`.", rich_help_panel=GALLERY)
    ] = "lab",
    limit: Annotated[int, typer.Option(min=1, help="Questions a task to choose from.", rich_help_panel=GALLERY)] = 24,
    repeats: Annotated[
        int, typer.Option(min=0, help="Runs whose median time is shown; 0 shows no times.", rich_help_panel=GALLERY)
    ] = 3,
) -> None:
    """Compare pruners in the browser: kept tokens, answers, probabilities, times.

    A picture and a question of yours, a slider for the budget, and why each token stays or goes. It needs the extra
    named demo; --static does not.
    """
    # Cheap checks first: the imports below take seconds, the model perhaps minutes.
    budget = Budget(keep)
    if not budget.is_fraction or budget.at_most:
        raise GripError(f"--keep {keep}: the slider counts in percent, so type a share such as 10%")
    if static is not None:
        checked_folder(static, "--static")
        names = split_names(tasks)

    from gripvlm import lab

    specs = split_pruners(pruners or (OF_LAB if model in lab.FOLDERS else OF_OTHERS))
    if static is None:
        try:
            from gripvlm.demo import page
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("gripvlm"):
                raise
            raise GripError(
                f'{error.name} is not installed, which the page needs: pip install "gripvlm[demo]"; '
                "--static FOLDER writes a gallery without it"
            ) from None

    from gripvlm.demo.compare import Asker
    from gripvlm.models.loading import load_model, quiet
    from gripvlm.pruners import get_pruner
    from gripvlm.tasks import get_tasks

    for spec in specs:
        get_pruner(spec)  # a name that is none is refused before the model is loaded
    quiet()
    if static is not None:
        from gripvlm.demo.gallery import gallery, write

        chosen = get_tasks(names)
        loaded = load_model(model, device)
        data = gallery(*loaded, chosen, specs, model_name=model, limit=limit, repeats=repeats)
        console().print(f"the gallery: {write(data, static)}", markup=False, soft_wrap=True)
        return
    # one question of each family of the lab to begin with; other models begin with a picture of the visitor's
    samples = [task.samples[0] for task in get_tasks(model)] if model in lab.FOLDERS else []
    asker = Asker(*load_model(model, device), max_new_tokens)
    page.launch(page.build(asker, specs, samples, budget, model), host, port)
