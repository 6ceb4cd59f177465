"""The embedded labs: small trained VLMs, each with a sample of its questions; docs/lab.md.

`lab` has prompts with one picture; `lab-dense` has one, two or four, and questions whose evidence is spread.

What is measured on it is lab evidence, never a statement about a 7B model. Importing this package registers the
lab's vision tower with transformers' Auto classes, so that
`AutoModelForImageTextToText.from_pretrained(gripvlm.lab.MODEL)` works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gripvlm.errors import GripError
from gripvlm.lab import tower as _tower  # noqa: F401  (registers the tower with AutoConfig and AutoModel)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

DATA = Path(__file__).parent / "data"
MODEL = DATA / "model"
SAMPLE = DATA / "sample"
FOLDERS = {"lab": DATA, "lab-dense": DATA / "dense"}
"""Name -> the folder with its `model/`, `sample/` and `grip/`."""


def load(name: str = "lab") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The VLM of a lab (float32, eval mode) and its processor, from the package's own folder.

    Raises:
        GripError: no lab of that name, or one whose model is not in this installation.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if name not in FOLDERS:
        raise GripError(f"no lab {name!r}: use one of {', '.join(FOLDERS)}")
    folder = FOLDERS[name] / "model"
    if not (folder / "config.json").exists():
        raise GripError(
            f"the model {name} is not in this installation ({folder} has no config.json): install "
            "gripvlm from a clone (pip install -e .), or use another model"
        )
    # A few megabytes from this disk: a bar would flash up and stay in logs.
    with _no_progress_bar():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    return model.eval(), AutoProcessor.from_pretrained(folder)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' progress bars are off inside, and as they were afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if not shown:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        # transformers' switch also moves the Hub's, which may have been off.
        logging.enable_progress_bar()
        if not hub_shown:
            disable_progress_bars()
