"""Plain down-sampling: the picture itself encoded at the size that gives the budget's tokens.

What a pruner has to beat, since a smaller picture also costs less in the vision encoder. VTC-Bench (arXiv 2510.07143)
found it ahead of many pruners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from gripvlm.api import encode
from gripvlm.budget import Budget
from gripvlm.errors import BudgetError
from gripvlm.eval.answering import make_inputs
from gripvlm.models.encoded import Encoded
from gripvlm.models.smaller import AS_IT_IS, interpolated_positions, raster_within, smaller_picture

__all__ = ["downsampled"]


@torch.no_grad()
def downsampled(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    encoded: Encoded,
    budget: Budget,
) -> tuple[dict[str, Any], Encoded]:
    """The inputs of a batch with smaller pictures, and their encoding.

    Args:
        questions: [B] texts of the user's turn.
        images: [B] lists of one picture or more.
        encoded: the same pictures at their full size.
        budget: of each picture. A raster may have fewer tokens, since not every number has factors that fit
            (`raster_within`); never more.

    Raises:
        BudgetError: a family that makes tiles or as many tokens of every picture; a processor that makes other rasters
            of the smaller pictures than were asked for.
    """
    image_processor = processor.image_processor
    rasters, pictures = [], []
    for own, items in zip(images, encoded.samples, strict=True):
        smaller = []
        for picture, item in zip(own, items, strict=True):
            if item.grid is None:
                raise BudgetError("this model's picture is no plain raster of tokens: leave downsample out")
            n = item.features.shape[0]
            raster = raster_within(item.grid, budget.count(n, "each image"))
            smaller.append(smaller_picture(model, image_processor, picture, raster))
            rasters.append(raster)
        pictures.append(smaller)
    options = {name: value for name, value in AS_IT_IS.items() if hasattr(image_processor, name)}
    inputs = make_inputs(model, processor, questions, pictures, **options)
    with interpolated_positions(model):
        small = encode(model, inputs)
    made = [item.grid for items in small.samples for item in items]
    if made != rasters:
        raise BudgetError(
            f"the processor makes rasters {made} of pictures made for {rasters}, so their size does not set the "
            "number of tokens: leave downsample out"
        )
    return inputs, small
