"""Repeats: cells of a picture that repeat their neighbours are merged before the vision tower sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import SameChoice


@dataclass(frozen=True)
class Repeats(SameChoice):
    """Merges cells that repeat their neighbours ahead of the vision tower; the inner pruner keeps some of the rest.

    For pages, screens and charts: `repeats(full)` merges and keeps all that is left, `repeats(divprune)` prunes that
    further; `keep` is then a count or a share of what is left. A cell is the block of patches that becomes one visual
    token. Which cells repeat is decided as PixelPrune (arXiv 2604.00886) does, by prediction from the neighbours on the
    left, above and above left (`models/repeats.py`). Cells that are left keep their own positions, in the tower and in
    the language model.

    1. The paper drops repeats; here, unless `counted` is false, the tower attends to a cell as to all m that it stands
       for (log m on the scores of its keys).
    2. The paper has it for towers without windows. In one with windows (Qwen2.5-VL's) cells are merged across them, and
       count only in the window that they are in; a window of which no cell is left is gone.
    3. The threshold is in units of the pixel values that the tower gets, after the processor's normalisation. The paper
       brings them back to [0, 1], for which it must know the processor.
    4. Each frame of a video is treated as a picture of its own.
    5. Also for plain ViTs (CLIP, SigLIP) that see images one by one: there a cell is a patch.

    Attributes:
        threshold: the largest difference of any pixel value from the cell that it repeats; 0 for equal bits. Qwen3-VL's
            processor makes [-1, 1] of pixels, where one step of 256 is 0.0078.
        counted: whether the tower attends to a merged cell as to many.
    """

    name = "repeats"
    source = "wrapper: PixelPrune, arXiv 2604.00886"
    stage: ClassVar[str] = "pixels"
    wraps: ClassVar[tuple[str, ...]] = ("input", "llm")

    threshold: float = 0.0
    counted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.threshold < float("inf"), "threshold=0.02, 0 or more")
        if unknown := sorted(self.inner.needs & {"grid", "vision_attention", "patches"}):
            raise PrunerError(
                f"pruner {self.name!r} leaves no plain raster, and rows of the vision tower are not brought back to "
                f"what it leaves, but {self.inner.name!r} needs {' and '.join(unknown)}: wrap one that does not, such "
                "as divprune"
            )
