"""Stage 2 of the lab's recipe: teach the language model to answer about the tower's tokens.

    python -m lab_vlm.train_reader POOL OUT --steps 4000            # --no-drop --name nodrop: the ablation

What makes two cores enough (docs/lab.md): an aligned start (vlm.start_aligned); two dozen questions behind one picture
in one sequence (packing.py); random token dropping, of single patches and of whole pieces; and, in the first half of
the run, a hint where to look: the last prompt token's attention in two middle layers is rewarded for falling on the
evidence. The tower keeps learning its tags from the same pictures; answers do not reach it.
Checkpoints every two minutes and resumes from the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gripvlm.utils import disk

from .packing import PATCHES, Packed, Packer, block_mask, drop
from .pool import HEADS, load_shard, shards
from .questions import FAMILIES
from .train_tower import Tagger, augment, normalised, save_checkpoint, tag_loss, tower_config
from .vlm import build_model, start_aligned

HINT_LAYERS = (2, 3)


@dataclass(frozen=True)
class Recipe:
    """What a run is; a checkpoint of another recipe is refused."""

    steps: int = 4000  # length of the whole schedule
    batch: int = 16  # pictures a step
    rate: float = 1.5e-3
    tag_rate: float = 3e-4  # learning rate of the tower and its tags
    hint: float = 0.3  # first weight of the hint where to look
    dropping: bool = True
    start: str = ""  # a finished run to start from


class AttentionRows:
    """Attention of chosen query rows over the visual tokens in chosen layers, computed beside SDPA."""

    def __init__(self, model: LlavaForConditionalGeneration, layers: tuple[int, ...]):
        self.inputs: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.attention = {i: model.model.language_model.layers[i].self_attn for i in layers}
        for i, module in self.attention.items():
            module.register_forward_pre_hook(self._hook(i), with_kwargs=True)

    def _hook(self, i: int):
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.inputs[i] = (kwargs["hidden_states"], kwargs["position_embeddings"])

        return record

    def mass(self, packed: Packed) -> list[torch.Tensor]:
        """Per layer: log of the attention mass on the evidence, relative to all visual tokens, [r]."""
        out, v = [], packed.evidence.shape[1]
        picture, index = packed.row.unbind(1)
        for i, module in self.attention.items():
            hidden, (cos, sin) = self.inputs[i]
            shape = (*hidden.shape[:2], -1, module.head_dim)
            q, k = (project(hidden).view(shape).transpose(1, 2).float() for project in (module.q_proj, module.k_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            rows = q[picture, :, 1 + v + index]  # [r, heads, d]
            scores = torch.einsum("rhd,rhvd->rhv", rows, k[picture, :, 1 : 1 + v]) * module.scaling
            share = scores.softmax(-1)[:, :3].mean(1)  # the three mimetic heads
            out.append(torch.log((share * (packed.evidence > 0.15)).sum(-1) + 1e-4))
        return out


def forward(model: LlavaForConditionalGeneration, features: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Logits [m, vocab] at the m positions that have a target."""
    table = model.get_input_embeddings()
    b, v = len(packed.keep), len(packed.keep[0])
    bos = table(torch.full((b, 1), 1))
    visual = model.model.multi_modal_projector(features)
    index = torch.from_numpy(np.stack(packed.keep)).long()
    visual = visual.gather(1, index[..., None].expand(-1, -1, visual.shape[-1]))
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([bos, visual.to(bos.dtype), table(packed.ids)], dim=1),
        attention_mask=block_mask(packed.segment),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state[:, 1 + v :]
    return model.lm_head(hidden[packed.target >= 0]).float()


@torch.no_grad()
def score(
    model: LlavaForConditionalGeneration, tagger: Tagger, packer: Packer, shard: dict, pictures: int
) -> dict[str, float]:
    """Share of questions whose every answer token is the model's first choice, by family (teacher-forced)."""
    rng = np.random.default_rng(5)
    right: dict[str, list[bool]] = {f: [] for f in FAMILIES}
    for start in range(0, min(pictures, len(shard["images"])), 16):
        questions = [packer.choose(q, rng) for q in shard["questions"][start : start + 16]]
        pixels = normalised(shard["images"][start : start + 16])
        packed = packer.pack(questions, [np.arange(PATCHES)] * len(questions), renumber=False)
        features = tagger.tower(pixels).last_hidden_state[:, 1:]
        hit = torch.zeros_like(packed.target, dtype=torch.bool)
        hit[packed.target >= 0] = forward(model, features, packed).argmax(-1) == packed.target[packed.target >= 0]
        for b, first, last, family in packed.family:
            right[family].append(bool(hit[b, first:last].all()))
    return {f: round(float(np.mean(r)), 3) for f, r in right.items() if r}


def load_tagger(out: Path) -> Tagger:
    state = torch.load(out / "tower.pt", weights_only=False)
    tagger = Tagger(tower_config())
    tagger.load_state_dict(state["model"])
    return tagger.eval().requires_grad_(False)


class Run:
    """A model in training, and everything that a checkpoint holds."""

    def __init__(self, out: Path, name: str, recipe: Recipe) -> None:
        self.out, self.checkpoint, self.recipe = out, out / f"{name}.pt", recipe
        torch.manual_seed(1)
        self.rng = np.random.default_rng(1)
        self.tagger, self.packer = load_tagger(out), Packer()
        self.model = build_model(self.tagger.tower.config)
        self.model.model.vision_tower = self.tagger.tower
        start_aligned(self.model, {n: h.state_dict()["weight"] for n, h in self.tagger.heads.items()}, HEADS)
        self.hints = AttentionRows(self.model, HINT_LAYERS)
        # The tower is frozen here, so these are the reader's weights alone.
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.weights, lr=recipe.rate, weight_decay=0.02, betas=(0.9, 0.98))
        self.tagger.requires_grad_(True).train()
        tags = self.tagger.parameters()
        self.tag_optimiser = torch.optim.AdamW(tags, lr=recipe.tag_rate, weight_decay=0.05, betas=(0.9, 0.98))
        self.seconds, self.step, self.questions = 0.0, 0, 0
        if self.checkpoint.exists():
            self._resume()
        elif recipe.start:
            self._load_weights(torch.load(out / f"{recipe.start}.pt", weights_only=False))
            self.rng = np.random.default_rng(2)  # other pictures and questions than the first run's

    def _load_weights(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.tagger.load_state_dict(state["tagger"])

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=False)
        if state["recipe"] != asdict(self.recipe):
            given = asdict(self.recipe)
            raise SystemExit(f"{self.checkpoint} was trained with {state['recipe']}, not {given}: type another --name")
        self._load_weights(state)
        self.optimiser.load_state_dict(state["optimiser"])
        self.tag_optimiser.load_state_dict(state["tag_optimiser"])
        self.seconds, self.step, self.questions = state["seconds"], state["step"], state["questions"]
        self.rng.bit_generator.state = state["rng"]
        print(f"resuming at step {self.step}, {self.seconds / 60:.1f} minutes spent", flush=True)

    def save(self, path: Path | None = None) -> None:
        save_checkpoint(
            path or self.checkpoint,
            recipe=asdict(self.recipe),
            model=self.model.state_dict(),
            tagger=self.tagger.state_dict(),
            optimiser=self.optimiser.state_dict(),
            tag_optimiser=self.tag_optimiser.state_dict(),
            rng=self.rng.bit_generator.state,
            seconds=self.seconds,
            step=self.step,
            questions=self.questions,
        )

    def learn(self, images: np.ndarray, labels: np.ndarray, pools: list[list]) -> dict[str, float]:
        """One step on a batch of pictures; returns its losses."""
        recipe, done = self.recipe, self.step / self.recipe.steps
        decay = min(1.0, 0.85 * (1 + math.cos(math.pi * done)))  # flat for two fifths of the run, then a cosine
        for optimiser, rate in ((self.optimiser, recipe.rate), (self.tag_optimiser, recipe.tag_rate)):
            optimiser.param_groups[0]["lr"] = rate * min(1.0, (self.step + 1) / 150) * (0.02 + 0.98 * decay)
        questions = [self.packer.choose(p, self.rng) + self.packer.stepping_stones(p, self.rng) for p in pools]
        keep = drop(questions, self.rng, recipe.dropping)
        packed = self.packer.pack(questions, keep, renumber=bool(self.rng.random() < 0.25))
        losses = {}
        with torch.autocast("cpu", torch.bfloat16):
            features, tags = self.tagger.tag(augment(images, self.rng))
            tagging = tag_loss(tags, torch.from_numpy(labels))
            logits = forward(self.model, features.detach(), packed)
            loss = F.cross_entropy(logits, packed.target[packed.target >= 0])
            total, weight = loss, recipe.hint * max(0.0, 1 - done / 0.5)
            if weight and len(packed.row):
                missed = -torch.stack(self.hints.mass(packed)).mean()
                losses["hint"] = float(missed.detach())
                total = total + weight * missed
        for optimiser, goal, parameters in (
            (self.optimiser, total, self.weights),
            (self.tag_optimiser, tagging, [*self.tagger.parameters()]),
        ):
            optimiser.zero_grad()
            goal.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        self.step, self.questions = self.step + 1, self.questions + len(packed.family)
        return {"loss": float(loss.detach()), **losses, "tagging": float(tagging.detach())}

    def validate(self, shard: dict, pictures: int) -> dict[str, float]:
        self.model.eval()
        scores = score(self.model, self.tagger, self.packer, shard, pictures)
        self.model.train()
        return scores


def train(pool: Path, out: Path, name: str, recipe: Recipe, stop: int = 0, snapshot: int = 0) -> None:
    """Trains to the end of the schedule, or to step `stop`; `snapshot` is a step whose checkpoint is kept as well."""
    run = Run(out, name, recipe)
    val = load_shard(shards(pool, "val")[0])
    clock = saved = time.monotonic()
    recent: list[dict[str, float]] = []
    shard, order = {}, np.arange(0)
    while run.step < min(recipe.steps, stop or recipe.steps):
        if len(order) < recipe.batch:
            files = shards(pool, "train")
            shard = load_shard(files[run.rng.integers(len(files))])
            order = run.rng.permutation(len(shard["images"]))
        pictures, order = order[: recipe.batch], order[recipe.batch :]
        pools = [shard["questions"][i] for i in pictures]
        recent.append(run.learn(shard["images"][pictures], shard["labels"][pictures], pools))
        now = time.monotonic()
        run.seconds, clock = run.seconds + now - clock, now
        if run.step % 50 == 0:
            line: dict[str, object] = {"step": run.step, "minutes": round(run.seconds / 60, 2)}
            for key in ("loss", "hint", "tagging"):
                if values := [losses[key] for losses in recent if key in losses]:
                    line[key] = round(float(np.mean(values)), 3)
            recent = []
            if run.step % 250 == 0:
                line["val"] = run.validate(val, 64)
            print(json.dumps({**line, "questions": run.questions}), flush=True)
        if run.step == snapshot:
            run.save(out / f"{name}-{run.step}.pt")
        if now - saved > 120:
            run.save()
            saved = now
    run.save()
    report = {"minutes": run.seconds / 60, "steps": run.step, "questions": run.questions, "dropping": recipe.dropping}
    report["val"] = run.validate(val, 320)
    print(json.dumps(report), flush=True)
    disk.write(out / f"{name}.json", json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path, help="folder with tower.pt; the reader's checkpoint is written there")
    parser.add_argument("--name", default="reader")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the whole schedule")
    parser.add_argument("--stop", type=int, default=0, help="stop after this many steps of the schedule")
    parser.add_argument("--snapshot", type=int, default=0, help="also keep the checkpoint of this step")
    parser.add_argument("--no-drop", action="store_true", help="never drop visual tokens in training (the ablation)")
    parser.add_argument("--start", default="", metavar="NAME", help="start from this finished run instead of anew")
    parser.add_argument("--hint", type=float, default=Recipe.hint, help="first weight of the hint where to look")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument(
        "--tag-rate", type=float, default=Recipe.tag_rate, help="learning rate of the tower and its tags"
    )
    args = parser.parse_args()
    recipe = Recipe(args.steps, args.batch, args.rate, args.tag_rate, args.hint, not args.no_drop, args.start)
    train(args.pool, args.out, args.name, recipe, args.stop, args.snapshot)


if __name__ == "__main__":
    main()
