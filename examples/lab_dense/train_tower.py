"""Stage 1 of `lab-dense`: the first lab's tower learns to tag boards, and its CLS token to know what is on them.

    torchrun --nproc-per-node 2 -m lab_dense.train_tower BOARDS SCENES OUT --steps 2750

Starts from the tower that ships with the first lab. A fifth of the pictures are the first lab's scenes, so that it
keeps what it knew. The CLS token learns which classes and which colours are in the picture; nothing in the first lab
taught it anything, so pruners that read its attention could not be judged there. Checkpoints every minute and resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gripvlm import lab
from gripvlm.lab.tower import LabVisionConfig, LabVisionModel
from gripvlm.utils import disk
from lab_vlm.pool import load_shard, shards
from lab_vlm.train_tower import augment, normalised, save_checkpoint

from . import parallel
from .boards import GRID
from .pool import HEADS, UNKNOWN, first_lab_labels

PRESENT = ("cls", "colour")
"""What the CLS token names: for each value of these heads, whether it is in the picture."""
HARD = ("cls", "tens", "units")


class Tagger(nn.Module):
    """The tower, one linear classifier a head on each patch, and two on the CLS token."""

    def __init__(self, config: LabVisionConfig):
        super().__init__()
        self.tower = LabVisionModel(config)
        sizes = {name: len(names) for name, names in HEADS.items()} | {"row": GRID, "column": GRID}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, n) for name, n in sizes.items()})
        self.present = nn.ModuleDict({name: nn.Linear(config.hidden_size, len(HEADS[name])) for name in PRESENT})

    def forward(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Scores of every patch head [b, n, classes], and of every CLS head [b, classes]."""
        hidden = self.tower(pixels).last_hidden_state
        patches = {name: head(hidden[:, 1:]).float() for name, head in self.heads.items()}
        return patches, {name: head(hidden[:, 0]).float() for name, head in self.present.items()}


def present(planes: torch.Tensor, name: str) -> torch.Tensor:
    """1 for each value of head `name` that is in the picture, [b, classes]."""
    values = F.one_hot(planes[:, list(HEADS).index(name)].long(), len(HEADS[name]))
    return values.amax(1).float()


def tag_loss(patches: dict[str, torch.Tensor], cls: dict[str, torch.Tensor], planes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per head, patches with and without a tag weighing the same in total; and the CLS token's."""
    loss = torch.zeros((), device=planes.device)
    for i, name in enumerate(HEADS):
        target = planes[:, i].long()
        entropy = F.cross_entropy(patches[name].transpose(1, 2), target, reduction="none", ignore_index=UNKNOWN)
        tagged, empty = (target > 0) & (target != UNKNOWN), target == 0
        weight = 2.0 if name in HARD else 1.0
        loss = loss + weight * (entropy * tagged).sum() / tagged.sum().clamp(min=1)
        loss = loss + 0.5 * (entropy * empty).sum() / empty.sum().clamp(min=1)
    cells = torch.arange(GRID * GRID, device=planes.device)
    for name, target in (("row", cells // GRID), ("column", cells % GRID)):
        loss = loss + 0.3 * F.cross_entropy(patches[name].flatten(0, 1), target.repeat(len(planes)))
    for name in PRESENT:
        loss = loss + 2 * F.binary_cross_entropy_with_logits(cls[name][:, 1:], present(planes, name)[:, 1:])
    return loss


@torch.no_grad()
def tag_accuracy(model: Tagger, images: np.ndarray, planes: np.ndarray) -> dict[str, float]:
    """Share of tagged patches whose tag is right, per head; of the CLS token: average precision over the pictures."""
    model.eval()
    right, total = dict.fromkeys(HEADS, 0.0), dict.fromkeys(HEADS, 0.0)
    precision: dict[str, list[float]] = {name: [] for name in PRESENT}
    for start in range(0, len(images), 64):
        device = next(model.parameters()).device
        labels = torch.from_numpy(planes[start : start + 64]).to(device)
        patches, cls = model(normalised(images[start : start + 64]).to(device))
        for i, name in enumerate(HEADS):
            tagged = (labels[:, i] > 0) & (labels[:, i] != UNKNOWN)
            right[name] += float((patches[name].argmax(-1)[tagged] == labels[:, i].long()[tagged]).sum())
            total[name] += float(tagged.sum())
        for name in PRESENT:
            hit = present(labels, name)[:, 1:]
            order = cls[name][:, 1:].argsort(descending=True)
            hit = hit.gather(1, order)
            at = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1, device=device)
            precision[name] += ((at * hit).sum(1) / hit.sum(1).clamp(min=1)).tolist()
    model.train()
    scores = {name: round(right[name] / total[name], 4) for name in HEADS if total[name]}
    return scores | {f"CLS {name}": round(float(np.mean(values)), 4) for name, values in precision.items()}


def train(boards: Path, scenes: Path, out: Path, steps: int, batch: int = 10, rate: float = 7e-4) -> None:
    """`batch` pictures a step in each process (parallel.py)."""
    rank, device = parallel.start(), parallel.device()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    first = lab.load()[0].model.vision_tower
    model = Tagger(first.config)
    model.tower.load_state_dict(first.state_dict())
    model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    checkpoint = out / "tower.pt"
    spent, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False, map_location=device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        spent, step = state["spent"], state["step"]
        print(f"resuming at step {step}, {spent / 60:.1f} minutes spent", flush=True)
    rng = np.random.default_rng((0, rank, step))

    def save() -> None:
        if rank == 0:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save_checkpoint(checkpoint, **state, spent=spent, step=step)

    val = load_shard(shards(boards, "val")[0])
    clock = saved = time.monotonic()
    few = batch // 5  # scenes of the first lab
    while step < steps:
        new, old = shards(boards, "train"), shards(scenes, "train")
        shard, other = load_shard(new[rng.integers(len(new))]), load_shard(old[rng.integers(len(old))])
        other["labels"] = first_lab_labels(other["labels"])
        order = rng.permutation(len(shard["images"]))
        for rows in order[: len(order) // (batch - few) * (batch - few)].reshape(-1, batch - few):
            for group in optimiser.param_groups:
                decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = rate * min(1.0, (step + 1) / 200) * decay
            more = rng.integers(0, len(other["images"]), few)
            images = np.concatenate([shard["images"][rows], other["images"][more]])
            planes = torch.from_numpy(np.concatenate([shard["labels"][rows], other["labels"][more]])).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                patches, cls = model(augment(images, rng).to(device))
            loss = tag_loss(patches, cls, planes)
            optimiser.zero_grad()
            loss.backward()
            parallel.average_gradients(model.parameters())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            now = time.monotonic()
            spent, clock = spent + now - clock, now
            if step % 100 == 0 and rank == 0:
                line: dict[str, object] = {"step": step, "minutes": round(spent / 60, 2), "loss": round(loss.item(), 3)}
                if step % 500 == 0:
                    line["val"] = tag_accuracy(model, val["images"][:256], val["labels"][:256])
                print(json.dumps(line), flush=True)
            if now - saved > 60:
                save()
                saved = now
            if step == steps:
                break
    save()
    if rank == 0:
        report: dict[str, object] = {"minutes": spent / 60, "steps": step}
        report["val"] = tag_accuracy(model, val["images"], val["labels"])
        print(json.dumps(report), flush=True)
        disk.write(out / "tower.json", json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", type=Path, help="the pool of boards")
    parser.add_argument("scenes", type=Path, help="the pool of the first lab's scenes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2750)
    args = parser.parse_args()
    train(args.boards, args.scenes, args.out, args.steps)


if __name__ == "__main__":
    main()
