"""The scorer of a run as it was at its last step; its folder has the best of those that were validated."""

from __future__ import annotations

from pathlib import Path

import torch

from gripvlm.grip.scorer import Scorer


def last_step(folder: Path) -> Scorer:
    """Read from the run's one checkpoint."""
    (checkpoint,) = folder.glob("*.ckpt")
    scorer = Scorer.from_pretrained(folder)
    scorer.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["modules"]["scorer"])
    return scorer.eval()
