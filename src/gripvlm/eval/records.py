"""One answer as a line of the samples file: made from a batch's answers, and checked when it is read back."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gripvlm.errors import GripError
from gripvlm.eval.answering import SECONDS, BatchAnswers
from gripvlm.eval.variants import DOWNSAMPLE, Variant
from gripvlm.models.encoded import Encoded, Item
from gripvlm.tasks import Sample, Task
from gripvlm.types import Raster, Selection
from gripvlm.utils.strict_json import BadJSON

__all__ = ["Key", "TokenMask", "unpack_masks"]

Key = tuple[str, str, str, str]
"""(task, pruner, keep, id): what an answer is known by."""
_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "pruner", "keep", "id", "image_id", "prediction"), (str,)),
    **dict.fromkeys(("score", "k"), _NUMBER),
    "n": (int,),
    "seconds": (dict,),
}


def key_of(record: Mapping[str, Any]) -> Key:
    return str(record["task"]), str(record["pruner"]), str(record["keep"]), str(record["id"])


def make_records(
    task: Task, samples: Sequence[Sample], variant: Variant, answers: BatchAnswers, encoded: Encoded
) -> list[dict[str, Any]]:
    """One record a sample; the batch's seconds are shared out evenly.

    `k` of the sample's `n` visual tokens were paid for; `tower`, where some were dropped inside the vision tower, are
    those that its last blocks saw. `kept` has one mask an image (see `pack_mask`), or `layers` the counts of each layer
    where tokens are dropped inside the language model. Neither is there for smaller pictures, whose tokens are none of
    the n.

    Args:
        encoded: the pictures at their full size.
    """
    # A batch is timed as a whole: the time of a single sample is unknown.
    seconds = {name: value / len(samples) for name, value in answers.seconds.items()}
    records = []
    for i, sample in enumerate(samples):
        selections, prediction = answers.selections[i], answers.predictions[i]
        score, paid = float(task.score(prediction, sample)), sum(selection.paid for selection in selections)
        if not math.isfinite(score):
            raise GripError(f"task {task.name!r} scores sample {sample.id!r} with {score}: return a finite number")
        record = {
            "task": task.name,
            "pruner": variant.label,
            "keep": variant.keep_text,
            "id": sample.id,
            "image_id": sample.image_id,
            "answer": sample.answer,
            "prediction": prediction,
            "score": score,
            # An int where it is one, so that counts look like counts.
            "k": int(paid) if paid == int(paid) else round(paid, 4),
            "n": sum(item.features.shape[0] for item in encoded.samples[i]) if selections else 0,
            "seconds": seconds,
            "peak_memory": answers.peak_memory,
        }
        if any(selection.tower is not None for selection in selections):
            record["tower"] = sum(s.n if s.tower is None else s.tower for s in selections)
        if any(selection.layers for selection in selections):
            record["layers"] = [selection.counts for selection in selections]
        # Where each layer has its own tokens, one mask would not say which were kept.
        elif selections and variant.label != DOWNSAMPLE:
            record["kept"] = [pack_mask(*pair) for pair in zip(selections, encoded.samples[i], strict=True)]
        records.append(record)
    return records


@dataclass(frozen=True, eq=False)
class TokenMask:
    """The tokens of one image that were kept, as read back; `gripvlm.report.overlay` draws it like a `Selection`.

    Attributes:
        kept: [n] bool.
        grid: (h, w) of its raster, or None.
        rasters: those that it is made of, where it is several (see `VisualTokens.rasters`).
        merge: True where the dropped rows were averaged into the kept ones, else None.
    """

    kept: Tensor
    grid: tuple[int, int] | None = None
    merge: object = None
    rasters: tuple[Raster, ...] = ()

    @property
    def n(self) -> int:
        return int(self.kept.numel())

    def mask(self) -> Tensor:
        return self.kept


def pack_mask(selection: Selection, item: Item) -> dict[str, Any]:
    """{"n", "grid", "mask"}: the mask's bits in row order, the first is the highest of its byte, base64.

    "rasters" as well for an image that is several, and "merged" where rows were.
    """
    bits = np.packbits(selection.mask().cpu().numpy())
    packed: dict[str, Any] = {
        "n": selection.n,
        "grid": None if item.grid is None else list(item.grid),
        "mask": base64.b64encode(bits.tobytes()).decode(),
    }
    if item.rasters:
        packed["rasters"] = [list(raster) for raster in item.rasters]
    return packed | ({"merged": True} if selection.merge is not None else {})


def unpack_masks(items: Sequence[Mapping[str, Any]]) -> list[TokenMask]:
    """The masks of a record's `kept`."""
    masks = []
    for item in items:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(item["mask"]), dtype=np.uint8), count=item["n"])
        grid = None if item["grid"] is None else (int(item["grid"][0]), int(item["grid"][1]))
        rasters = tuple(Raster(*raster) for raster in item.get("rasters", ()))
        masks.append(TokenMask(torch.from_numpy(bits.astype(bool)), grid, item.get("merged"), rasters))
    return masks


def check_record(row: Any) -> None:
    """Passes for the line of a samples file that is an answer that can be counted and drawn.

    Raises:
        BadJSON: with the first thing that is wrong.
    """
    # By hand and not by a JSON schema: files have hundreds of thousands of lines.
    try:
        sound = {name: _has_type(row[name], kinds) for name, kinds in _FIELDS.items()}
        if sound["seconds"]:
            sound["seconds"] = all(_has_type(row["seconds"][name], _NUMBER) for name in (*SECONDS, *row["seconds"]))
        sound["kept"] = all(_is_mask(item) for item in row.get("kept", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadJSON(f"is no answer ({type(error).__name__}: {error})") from None
    for name in sound:
        if not sound[name]:
            text = json.dumps(row[name], ensure_ascii=False)
            raise BadJSON(f"says that {name} is {text if len(text) <= 60 else text[:57] + '...'}")


def _has_type(value: Any, kinds: tuple[type, ...]) -> bool:
    # `type`, since True is an int for isinstance. Strict JSON has no NaN, but Python writes and reads it.
    return type(value) in kinds and (type(value) is not float or math.isfinite(value))


def _is_mask(item: Any) -> bool:
    """Whether it has n bits, and a raster, several or none."""
    n, grid, rasters = item["n"], item["grid"], item.get("rasters", ())
    has_raster = grid is None or (len(grid) == 2 and all(type(side) is int and side > 0 for side in grid))
    for raster in rasters:
        start, height, width, stride = raster
        inside = all(type(value) is int and value >= 0 for value in raster) and height > 0 and 0 < width <= stride
        has_raster &= inside and start + (height - 1) * stride + width <= n
    return has_raster and type(n) is int and 0 < n <= 8 * len(base64.b64decode(item["mask"], validate=True))
