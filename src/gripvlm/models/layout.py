"""Where everything lies in a batch of prompts: read to the host once, before the vision encoder is started.

What comes after the encoder can then be asked of an accelerator without waiting for what it was asked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.encoded import Encoded, Item, Span
from gripvlm.models.text import full_mask, placeholder

__all__ = ["Layout"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Layout:
    """B prompts of L columns.

    Attributes:
        inputs: what the layout is of; whole numbers that are no pixels on the host.
        ids: [B, L] token ids.
        mask: [B, L] bool, False at padding.
        places: modality -> [B] columns of its placeholders, ascending.
    """

    inputs: Mapping[str, Any]
    ids: Array
    mask: Array
    places: Mapping[str, Sequence[Array]]

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any]) -> Layout:
        """Of checked inputs."""
        told = {name: value if name.startswith("pixel") else _hosted(value) for name, value in inputs.items()}
        ids, mask = told["input_ids"].numpy(), (full_mask(model, told) != 0).cpu().numpy()
        names = [name for name in ("image", "video") if getattr(model.config, f"{name}_token_id", None) is not None]
        marked = {name: ids == placeholder(model, name) for name in names}
        return cls(told, ids, mask, {name: [row.nonzero()[0] for row in found] for name, found in marked.items()})

    @property
    def right(self) -> bool:
        """Whether padding is on the right."""
        return not bool(self.mask[:, -1].all())

    @property
    def ends_in_image(self) -> bool:
        """Whether the last token of any prompt is a placeholder."""
        last = self.ids.shape[1] - 1
        return any(len(columns) and columns[-1] == last for rows in self.places.values() for columns in rows)

    def spans(self, encoded: Encoded) -> list[list[Span]]:
        """Where each item's placeholders are: a list (samples) of lists of `Span`, in prompt order.

        Raises:
            InputError: the prompts' placeholders and the encoded rows do not match in number.
        """
        if len(self.ids) != len(encoded):
            raise InputError(f"{len(self.ids)} prompts, but images are encoded for {len(encoded)}")
        samples = []
        for sample, items in enumerate(encoded.samples):
            spans: list[tuple[Item, Array]] = []
            for modality in encoded.outputs:
                mine = [item for item in items if item.modality == modality]
                columns = self.places[modality][sample]
                ends = np.cumsum([item.features.shape[0] for item in mine], dtype=np.int64)
                if len(columns) != sum(ends[-1:]):
                    raise InputError(
                        f"sample {sample} has {len(columns)} {modality} placeholder tokens, but "
                        f"{sum(ends[-1:])} visual tokens are encoded for it"
                    )
                spans += list(zip(mine, np.split(columns, ends[:-1]), strict=False))
            spans.sort(key=lambda span: int(span[1][0]))
            mask = self.mask[sample]
            samples.append([Span(item, torch.from_numpy(at), int(mask[at].sum())) for item, at in spans])
        return samples


def _hosted(value: Any) -> Any:
    """Whole numbers on the host: ids, masks, grids, sizes, coordinates."""
    return value.detach().cpu() if isinstance(value, Tensor) and not value.is_floating_point() else value
