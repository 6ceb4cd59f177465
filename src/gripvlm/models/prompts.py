"""A batch of prompts, read to the host once, before the vision encoder starts.

Reading a value from an accelerator waits for all operations queued before. What is read here, while the accelerator
is idle, need not be read later, when it would wait for the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.encoded import Encoded, Item, Span
from gripvlm.models.text import full_mask, placeholder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EncodedPrompts", "Prompts"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Prompts:
    """B prompts of L columns.

    Attributes:
        model: the model that they are for.
        inputs: what its processor returned, on the model's device.
        host: the same, but ids, masks, grids and all other whole numbers are on the host.
        ids: [B, L] token ids.
        mask: [B, L] bool, False at padding.
        placeholders: modality -> for each prompt the columns of its placeholder tokens, ascending.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    host: Mapping[str, Any]
    ids: Array
    mask: Array
    placeholders: Mapping[str, Sequence[Array]]

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Prompts:
        """Reads checked inputs."""
        # Pixels stay where they are: nothing on the host reads their values, and they are large.
        host = {name: value if name.startswith("pixel") else _to_host(value) for name, value in inputs.items()}
        ids, mask = host["input_ids"].numpy(), (full_mask(model, host) != 0).cpu().numpy()
        placeholders = {}
        for name in ("image", "video"):
            if getattr(model.config, f"{name}_token_id", None) is not None:
                placeholders[name] = [row.nonzero()[0] for row in ids == placeholder(model, name)]
        return cls(model, inputs, host, ids, mask, placeholders)

    @property
    def padded_right(self) -> bool:
        """Whether any padding is on the right."""
        return not bool(self.mask[:, -1].all())

    @property
    def end_in_image(self) -> bool:
        """Whether the last token of any prompt is a placeholder."""
        last = self.ids.shape[1] - 1
        return any(len(columns) and columns[-1] == last for rows in self.placeholders.values() for columns in rows)

    def with_images(self, encoded: Encoded) -> EncodedPrompts:
        """Finds each item's placeholders.

        Raises:
            InputError: the number of placeholders and of encoded rows differ.
        """
        if len(self.ids) != len(encoded):
            raise InputError(f"{len(self.ids)} prompts, but images are encoded for {len(encoded)}")
        spans = []
        for sample, items in enumerate(encoded.samples):
            located: list[tuple[Item, Array]] = []
            for modality in encoded.outputs:
                same = [item for item in items if item.modality == modality]
                columns = self.placeholders[modality][sample]
                ends = np.cumsum([item.placeholders for item in same], dtype=np.int64)
                if len(columns) != sum(ends[-1:]):
                    raise InputError(
                        f"sample {sample} has {len(columns)} {modality} placeholder tokens, but "
                        f"{sum(ends[-1:])} visual tokens are encoded for it"
                    )
                parts = zip(same, np.split(columns, ends[:-1]), strict=False)
                located += [(item, part[: len(part) - item.behind]) for item, part in parts]
            # Modality by modality so far; callers and pruners count images as the prompt has them.
            located.sort(key=lambda pair: int(pair[1][0]))
            mask = self.mask[sample]
            spans.append([Span(item, torch.from_numpy(at), int(mask[at].sum())) for item, at in located])
        return EncodedPrompts(self, encoded, spans)


class EncodedPrompts(NamedTuple):
    """Prompts and their encoded images: `spans` are a list (prompts) of lists of `Span`, in prompt order."""

    prompts: Prompts
    encoded: Encoded
    spans: list[list[Span]]


def _to_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) and not value.is_floating_point() else value
