"""The frozen tower's tokens of every picture of a pool, made once and kept on disk.

    python -m lab_dense.features BOARDS OUT --split train       # OUT/tower.pt is the tower

A training step need not run the tower then; 82 kB a picture in bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gripvlm import lab
from gripvlm.lab.tower import LabVisionModel
from lab_vlm.pool import load_shard, shards
from lab_vlm.train_tower import normalised

from . import parallel

WIDTH = 160


def load_tower(out: Path) -> LabVisionModel:
    """The tower of a finished stage 1."""
    tower = LabVisionModel(lab.load()[0].config.vision_config)
    state = torch.load(out / "tower.pt", weights_only=False, map_location="cpu")["model"]
    tower.load_state_dict({k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")})
    return tower.eval().requires_grad_(False)


def path_of(out: Path, pool: Path, split: str) -> Path:
    return out / f"{pool.name}-{split}.bf16"


@torch.no_grad()
def make(pool: Path, out: Path, split: str) -> None:
    """Writes the tokens of every picture of the split, in the order of its shards."""
    path = path_of(out, pool, split)
    if path.exists():
        return
    device = parallel.device()
    tower = load_tower(out).to(device)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for shard in shards(pool, split):
            images = load_shard(shard)["images"]
            for start in range(0, len(images), 50):
                with torch.autocast(device.type, torch.bfloat16):
                    tokens = tower(normalised(images[start : start + 50]).to(device)).last_hidden_state[:, 1:]
                file.write(tokens.cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
            print(f"{shard.name} done", flush=True)
    part.rename(path)


def load(pool: Path, out: Path, split: str) -> torch.Tensor:
    """bfloat16 [pictures, 256, WIDTH], mapped from disk."""
    path = path_of(out, pool, split)
    return torch.from_file(str(path), size=path.stat().st_size // 2, dtype=torch.bfloat16).view(-1, 256, WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path, help="folder with tower.pt; the tokens are written there")
    parser.add_argument("--split", default="train")
    args = parser.parse_args()
    make(args.pool, args.out, args.split)


if __name__ == "__main__":
    main()


__all__ = ["load", "load_tower", "make"]
