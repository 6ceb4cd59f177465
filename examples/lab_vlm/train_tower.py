"""Stage 1 of the lab's recipe: teach the vision tower to tag every patch with what lies there.

    python -m lab_vlm.train_tower POOL OUT --minutes 20

From answers alone a small tower stays blind for hours; dense tags teach it in minutes (docs/lab.md). Each patch is
labelled with its object class, colour, size, character and place in the string, device state, and with what it is
bound to (a sign's owner, an arrow's ends). Checkpoints every minute and resumes from the last one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gripvlm.lab.tower import LabVisionConfig, LabVisionModel
from gripvlm.utils import disk

from .pool import HEADS, load_shard, shards
from .scenes import CHARACTERS, GRID, PATCH, SIZE
from .vlm import MEAN, STD


def tower_config(width: int = 160, layers: int = 3) -> LabVisionConfig:
    return LabVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=SIZE,
        patch_size=PATCH,
        stem_channels=[32, 64],
        stem_blocks=[0, 2, 2],
        projection_dim=width,
    )


class Tagger(nn.Module):
    """The tower with one linear classifier a head, plus row and column so that place stays readable."""

    def __init__(self, config: LabVisionConfig):
        super().__init__()
        self.tower = LabVisionModel(config)
        sizes = {name: len(names) for name, names in HEADS.items()} | {"row": GRID, "column": GRID}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, n) for name, n in sizes.items()})

    def tag(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Patch features [b, n, d] and each head's scores [b, n, classes]."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        return patches, {name: head(patches).float() for name, head in self.heads.items()}

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.tag(pixels)[1]


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 [b, H, W, 3] to float [b, 3, H, W], as the processor does it."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def augment(images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """uint8 [b, H, W, 3] to normalised float [b, 3, H, W] with jittered brightness, contrast and tint."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    b = len(x)
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (b, 1, 1, 1)).astype(np.float32))
    tint = torch.from_numpy(rng.normal(0, 0.03, (b, 3, 1, 1)).astype(np.float32))
    x = (x - 0.5) * gain + 0.5 + tint
    return ((x.clamp(0, 1)) - MEAN) / STD


# characters are the smallest things in a scene and the slowest to learn
CLASS_WEIGHT = torch.tensor([3.0 if name in CHARACTERS and name else 1.0 for name in HEADS["cls"]])


def tag_loss(scores: dict[str, torch.Tensor], planes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per head; patches with and without a tag weigh the same in total."""
    loss = planes.new_zeros((), dtype=torch.float32)
    for i, name in enumerate(HEADS):
        target = planes[:, i].long()
        entropy = F.cross_entropy(scores[name].transpose(1, 2), target, reduction="none")
        tagged = (target > 0).float()
        if name == "cls":
            tagged = tagged * CLASS_WEIGHT[target]
        loss = loss + (entropy * tagged).sum() / tagged.sum().clamp(min=1)
        loss = loss + 0.5 * (entropy * (target == 0)).sum() / (target == 0).sum().clamp(min=1)
    cells = torch.arange(GRID * GRID)
    for name, target in (("row", cells // GRID), ("column", cells % GRID)):
        loss = loss + 0.3 * F.cross_entropy(scores[name].flatten(0, 1), target.repeat(len(planes)))
    return loss


@torch.no_grad()
def tag_accuracy(model: Tagger, shard: dict, scenes: int = 256) -> dict[str, float]:
    """Share of tagged patches whose tag is right, per head."""
    model.eval()
    right, total = dict.fromkeys(HEADS, 0.0), dict.fromkeys(HEADS, 0.0)
    for start in range(0, min(scenes, len(shard["images"])), 64):
        pixels = normalised(shard["images"][start : start + 64])
        planes = torch.from_numpy(shard["labels"][start : start + 64]).long()
        scores = model(pixels)
        for i, name in enumerate(HEADS):
            tagged = planes[:, i] > 0
            right[name] += float((scores[name].argmax(-1)[tagged] == planes[:, i][tagged]).sum())
            total[name] += float(tagged.sum())
    model.train()
    return {name: round(right[name] / max(total[name], 1), 4) for name in HEADS}


def save_checkpoint(path: Path, **state: object) -> None:
    packed = io.BytesIO()
    torch.save(state, packed)
    disk.write(path, packed.getvalue())


def train(pool: Path, out: Path, minutes: float, batch: int = 20, rate: float = 1e-3, bf16: bool = False) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Tagger(tower_config())
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    checkpoint = out / "tower.pt"
    spent, seen, step = 0.0, 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        spent, seen, step = state["spent"], state["seen"], state["step"]
        rng.bit_generator.state = state["rng"]
        print(f"resuming at step {step}, {spent / 60:.1f} minutes spent", flush=True)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "config": model.tower.config.to_dict(),
        }
        state |= {"spent": spent, "seen": seen, "step": step, "rng": rng.bit_generator.state}
        save_checkpoint(checkpoint, **state)

    val = load_shard(shards(pool, "val")[0])
    clock, saved = time.monotonic(), time.monotonic()
    while spent < minutes * 60:
        files = shards(pool, "train")
        shard = load_shard(files[rng.integers(len(files))])
        order = rng.permutation(len(shard["images"]))
        for rows in np.split(order, range(batch, len(order), batch)):
            done = min(spent / (minutes * 60), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = model(augment(shard["images"][rows], rng))
            loss = tag_loss(scores, torch.from_numpy(shard["labels"][rows]))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step, seen = step + 1, seen + len(rows)
            now = time.monotonic()
            spent, clock = spent + now - clock, now
            if step % 100 == 0:
                line: dict[str, object] = {
                    "step": step,
                    "minutes": round(spent / 60, 2),
                    "images": seen,
                    "loss": round(loss.item(), 3),
                }
                if step % 500 == 0:
                    line["val"] = tag_accuracy(model, val)
                print(json.dumps(line), flush=True)
            if now - saved > 60:
                save()
                saved = now
            if spent >= minutes * 60:
                break
    save()
    report: dict[str, object] = {"minutes": spent / 60, "images": seen, "val": tag_accuracy(model, val, 960)}
    print(json.dumps(report), flush=True)
    disk.write(out / "tower.json", json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    train(args.pool, args.out, args.minutes, bf16=args.bf16)


if __name__ == "__main__":
    main()
