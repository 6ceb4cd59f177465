"""Stage 2 of `lab-dense`: the language model learns to answer from evidence that is spread.

    torchrun --nproc-per-node 2 -m lab_dense.train_reader BOARDS SCENES OUT --steps 5000

Starts from the first lab's reader with more layers (vlm.build_model), on the frozen tower's tokens (features.py).
Prompts have one, two or four boards; some steps are the first lab's scenes and questions (PICTURES). Most steps drop
tokens (packing.drop). In the first three quarters of the run the last prompt token's attention in two layers is
rewarded for falling on the evidence. Checkpoints every two minutes and resumes.
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
from lab_vlm import packing as first_packing
from lab_vlm.pool import load_shard, shards
from lab_vlm.train_reader import HINT_LAYERS, AttentionRows
from lab_vlm.train_tower import save_checkpoint

from . import features, parallel
from .blocks import NAME as BLOCKS
from .blocks import Blocks
from .packing import IMAGE, WAYS, Asked, Packed, Packer, drop
from .questions import PATCHES, Things, ask, families_of
from .vlm import build_model

SHARE = {
    **{"half": 0.5, "colours": 0.5, "classes": 0.5, "corner": 2, "common": 6, "most": 7, "single": 0, "extreme": 5},
    **{"holder": 4, "missing": 4, "present": 2, "count": 0, "string": 1.5, "pictures": 4, "both": 2, "where": 2},
    **{"nowhere": 4, "overall": 8},
}
"""How often each family is tried; about half of the boards have what `common`, `most` and `overall` ask about."""
PROMPTS = {1: 7, 2: 5, 4: 3}
"""Prompts a step in each process, by pictures a prompt: about as many tokens each."""
PICTURES = (0.15, 0.35, 0.22, 0.28)
"""Share of the steps with the first lab's scenes, one, two and four boards."""
SPELLED = ("extreme", "string", "reading", "text")


@dataclass(frozen=True)
class Recipe:
    """What a run is; a checkpoint of another recipe is refused."""

    steps: int = 5000
    questions: int = 24  # a prompt
    rate: float = 1e-3
    hint: float = 0.3
    layers: int = 8


class Boards:
    """A pool's boards: their tokens and what is on them."""

    def __init__(self, pool: Path, out: Path, split: str):
        self.tokens = features.load(pool, out, split)
        self.things = [Things(facts) for shard in shards(pool, split) for facts in load_shard(shard)["facts"]]

    def __len__(self) -> int:
        return len(self.things)


class Scenes:
    """The first lab's scenes: their tokens and questions."""

    def __init__(self, pool: Path, out: Path, split: str):
        self.tokens = features.load(pool, out, split)
        self.questions = [q for shard in shards(pool, split) for q in load_shard(shard)["questions"]]

    def __len__(self) -> int:
        return len(self.questions)


def prompt_units(things: list[Things]) -> np.ndarray:
    """The unit of each cell of the prompt's pictures, distinct over them; -1 where none, [pictures * PATCHES]."""
    return np.concatenate(
        [np.where(t.facts.units >= 0, t.facts.units.astype(int) + 1000 * p, -1) for p, t in enumerate(things)]
    )


def ask_many(things: list[Things], packer: Packer, count: int, rng: np.random.Generator) -> list[Asked]:
    """`count` random questions about a prompt's boards."""
    names = families_of(len(things))
    share = np.array([SHARE[f] for f in names], float)
    asked: list[Asked] = []
    for family in rng.choice(names, 4 * count, p=share / share.sum()):
        question = ask(things, str(family), rng)
        if question is None:
            continue
        groups = [
            np.concatenate([np.flatnonzero(things[p].facts.units == u) + p * PATCHES for p, u in group])
            for group in question.evidence
        ]
        spelled = question.family in SPELLED
        asked.append(Asked(question.family, *packer.tokens(question.question, question.answer, spelled), groups))
        if len(asked) == count:
            break
    return asked


def ask_first_lab(
    questions: list, first: first_packing.Packer, packer: Packer, rng: np.random.Generator
) -> list[Asked]:
    """A few questions of the first lab about one of its scenes."""
    asked = []
    for q in (*first.choose(questions, rng), *first.stepping_stones(questions, rng)):
        cells = np.flatnonzero(q.evidence > 40)
        ids = packer.tokens(q.question, q.answer, q.family in SPELLED)
        asked.append(Asked(q.family, *ids, [cells] if len(cells) else []))
    return asked


class Hints(AttentionRows):
    """Attention of each question's last prompt token on its evidence."""

    def missed(self, packed: Packed) -> torch.Tensor:
        """Mean negative log of the attention mass on the evidence, relative to all visual tokens."""
        prompt, index = packed.rows.unbind(1)
        visual = (packed.ids == IMAGE).nonzero()[:, 1].view(len(packed.ids), -1)  # [b, v]
        out = []
        for i, module in self.attention.items():
            hidden, (cos, sin) = self.inputs[i]
            shape = (*hidden.shape[:2], -1, module.head_dim)
            q, k = (project(hidden).view(shape).transpose(1, 2) for project in (module.q_proj, module.k_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            rows = q[prompt, :3, index].float()  # [r, 3, d]: the three mimetic heads
            keys = k[:, :3].gather(2, visual[:, None, :, None].expand(-1, 3, -1, module.head_dim)).float()
            scores = torch.einsum("rhd,rhvd->rhv", rows, keys[prompt]) * module.scaling
            share = scores.softmax(-1).mean(1)
            out.append(-torch.log((share * packed.evidence).sum(-1) + 1e-4).mean())
        return torch.stack(out).mean()


def forward(model: LlavaForConditionalGeneration, tokens: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Logits [m, vocab] at the m positions that have a target. tokens: [b, pictures * 256, d] of the tower."""
    embeds = model.get_input_embeddings()(packed.ids)
    if packed.keep.shape[1]:
        kept = tokens.gather(1, packed.keep[..., None].expand(-1, -1, tokens.shape[-1]))
        visual = model.model.multi_modal_projector(kept)
        embeds = embeds.masked_scatter((packed.ids == IMAGE)[..., None], visual.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=packed.segment >= 0,
        blocks=Blocks.of(packed.segment),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[packed.target >= 0]).float()


class Run:
    """A model in training, and everything that a checkpoint holds."""

    def __init__(self, boards: Path, scenes: Path, out: Path, name: str, recipe: Recipe) -> None:
        self.checkpoint, self.recipe = out / f"{name}.pt", recipe
        torch.manual_seed(1)
        self.rank, self.device = parallel.start(), parallel.device()
        self.packer, self.first = Packer(), first_packing.Packer()
        self.model = build_model(recipe.layers)
        self.model.set_attn_implementation({"text_config": BLOCKS})
        self.model.model.vision_tower = features.load_tower(out)
        self.boards, self.scenes = Boards(boards, out, "train"), Scenes(scenes, out, "train")
        self.val, self.val_scenes = Boards(boards, out, "val"), Scenes(scenes, out, "val")
        self.hints = Hints(self.model, HINT_LAYERS)
        for layer in self.model.model.language_model.layers:
            for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                module.compile(dynamic=True)  # many small operations in one; a tenth of a step
        self.model.to(self.device)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.weights, lr=recipe.rate, weight_decay=0.02, betas=(0.9, 0.98), fused=True
        )
        self.seconds, self.step, self.seen = 0.0, 0, 0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=False, map_location=self.device)
            if state["recipe"] != asdict(recipe):
                raise SystemExit(f"{self.checkpoint} was trained with {state['recipe']}: type another --name")
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.seconds, self.step, self.seen = state["seconds"], state["step"], state["seen"]
            print(f"resuming at step {self.step}, {self.seconds / 60:.1f} minutes spent", flush=True)
        # What a step is about is the same in every process, so that none waits for another; the boards are not.
        self.plan = np.random.default_rng((1, self.step))
        self.rng = np.random.default_rng((2, self.rank, self.step))

    def save(self) -> None:
        if self.rank:
            return
        save_checkpoint(
            self.checkpoint,
            recipe=asdict(self.recipe),
            model=self.model.state_dict(),
            optimiser=self.optimiser.state_dict(),
            seconds=self.seconds,
            step=self.step,
            seen=self.seen,
        )

    def batch(self) -> tuple[torch.Tensor, Packed]:
        plan, rng = self.plan, self.rng
        pictures = int(plan.choice((0, 1, 2, 4), p=PICTURES))
        way, share, renumber = str(plan.choice(list(WAYS), p=list(WAYS.values()))), plan.random(), plan.random() < 0.25
        if pictures == 0:
            index = rng.integers(0, len(self.scenes), PROMPTS[1])
            tokens = self.scenes.tokens[torch.from_numpy(index)]
            asked = [ask_first_lab(self.scenes.questions[i], self.first, self.packer, rng) for i in index]
            units = [np.full(PATCHES, -1)] * len(index)
        else:
            index = rng.integers(0, len(self.boards), (PROMPTS[pictures], pictures))
            tokens = self.boards.tokens[torch.from_numpy(index)].flatten(1, 2)
            prompts = [[self.boards.things[i] for i in row] for row in index]
            asked = [ask_many(things, self.packer, self.recipe.questions, rng) for things in prompts]
            units = [prompt_units(things) for things in prompts]
        keep = drop(asked, units, way, share, rng)
        packed = self.packer.pack(asked, keep, max(pictures, 1), renumber=bool(renumber))
        return tokens.to(self.device), packed.to(self.device)

    def learn(self) -> dict[str, float]:
        """One step; returns its losses."""
        recipe, done = self.recipe, self.step / self.recipe.steps
        decay = min(1.0, 0.85 * (1 + math.cos(math.pi * done)))  # flat for two fifths of the run, then a cosine
        self.optimiser.param_groups[0]["lr"] = recipe.rate * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * decay)
        tokens, packed = self.batch()
        losses = {}
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = forward(self.model, tokens, packed)
            loss = F.cross_entropy(logits, packed.target[packed.target >= 0])
            total, weight = loss, recipe.hint * max(0.0, 1 - done / 0.75)
            if weight and len(packed.rows):
                missed = self.hints.missed(packed)
                losses["hint"] = float(missed.detach())
                total = total + weight * missed
        self.optimiser.zero_grad()
        total.backward()
        parallel.average_gradients(self.weights)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.step, self.seen = self.step + 1, self.seen + len(packed.spans) * parallel.processes()
        return {"loss": float(loss.detach()), **losses}

    @torch.no_grad()
    def validate(self, prompts: int) -> dict[str, float]:
        """Share of questions whose every answer token is the first choice, by family and pictures (teacher-forced)."""
        self.model.eval()
        rng = np.random.default_rng(5)
        right: dict[str, list[bool]] = {}
        for pictures in (0, 1, 2, 4):  # 0: the first lab's scenes
            for _ in range(-(-prompts // 8)):
                if pictures:
                    index = rng.integers(0, len(self.val), (8, pictures))
                    tokens = self.val.tokens[torch.from_numpy(index)].flatten(1, 2)
                    asked = [ask_many([self.val.things[i] for i in row], self.packer, 24, rng) for row in index]
                else:
                    index = rng.integers(0, len(self.val_scenes), 8)
                    tokens = self.val_scenes.tokens[torch.from_numpy(index)]
                    asked = [ask_first_lab(self.val_scenes.questions[i], self.first, self.packer, rng) for i in index]
                keep = [np.arange(max(pictures, 1) * PATCHES)] * 8
                packed = self.packer.pack(asked, keep, max(pictures, 1), renumber=False).to(self.device)
                hit = torch.zeros_like(packed.target, dtype=torch.bool)
                with torch.autocast(self.device.type, torch.bfloat16):
                    best = forward(self.model, tokens.to(self.device), packed).argmax(-1)
                hit[packed.target >= 0] = best == packed.target[packed.target >= 0]
                for b, first, last, family in packed.spans:
                    name = f"{family} {pictures}" if pictures else family
                    right.setdefault(name, []).append(bool(hit[b, first:last].all()))
        self.model.train()
        return {name: round(float(np.mean(hits)), 3) for name, hits in right.items()}


def train(run: Run, prompts: int) -> None:
    clock = saved = time.monotonic()
    recent: list[dict[str, float]] = []
    while run.step < run.recipe.steps:
        recent.append(run.learn())
        now = time.monotonic()
        run.seconds, clock = run.seconds + now - clock, now
        if run.step % 50 == 0 and run.rank == 0:
            line: dict[str, object] = {"step": run.step, "minutes": round(run.seconds / 60, 2)}
            for key in ("loss", "hint"):
                if values := [losses[key] for losses in recent if key in losses]:
                    line[key] = round(float(np.mean(values)), 3)
            recent = []
            if run.step % 500 == 0:
                line["val"] = run.validate(prompts)
            print(json.dumps({**line, "questions": run.seen}), flush=True)
        if now - saved > 120:
            run.save()
            saved = now
    run.save()
    if run.rank:
        return
    report = {"minutes": run.seconds / 60, "steps": run.step, "questions": run.seen, "val": run.validate(10 * prompts)}
    print(json.dumps(report), flush=True)
    disk.write(run.checkpoint.with_suffix(".json"), json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", type=Path, help="the pool of boards")
    parser.add_argument("scenes", type=Path, help="the pool of the first lab's scenes")
    parser.add_argument("out", type=Path, help="folder with tower.pt and the tokens; the checkpoint is written there")
    parser.add_argument("--name", default="reader")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the whole schedule")
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument(
        "--layers", type=int, default=Recipe.layers, help="of the language model; 5 are the first lab's"
    )
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps, rate=args.rate, layers=args.layers)
    train(Run(args.boards, args.scenes, args.out, args.name, recipe), 48)


if __name__ == "__main__":
    main()
