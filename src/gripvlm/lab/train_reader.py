"""Stage 2 of the lab's recipe: teach the language model to answer about the tower's tokens.

    python -m gripvlm.lab.train_reader POOL OUT --steps 4000            # --no-drop --name nodrop: the ablation

What makes two cores enough (docs/lab.md): an aligned start (vlm.start_aligned); two dozen questions behind one image
in one sequence, with a block mask so that each sees the image and itself only and positions that restart; random
token dropping, of single patches and of whole pieces; and, in the first part of the run, a hint at where to look
(the last prompt token's attention in two middle layers is rewarded for falling on the evidence), annealed to zero.
The tower goes on learning its tags meanwhile, from the same pictures; answers do not reach it.
Checkpoints every two minutes and resumes from the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gripvlm.lab.pool import HEADS, load_shard, shards
from gripvlm.lab.questions import FAMILIES, Question
from gripvlm.lab.scenes import GRID
from gripvlm.lab.train_tower import MEAN, STD, Tagger, augment, save_checkpoint, tag_loss, tower_config
from gripvlm.lab.vlm import build_model, build_tokenizer, prompt, spell, start_aligned
from gripvlm.utils import disk

N = GRID * GRID
HINT_LAYERS = (2, 3)
# questions a picture, by family; a picture that has fewer gives what it has
SHARE = {"existence": 4, "perception": 8, "science": 4, "diagram": 4, "reading": 4, "text": 2}


@dataclass
class Packed:
    """One batch: visual tokens first, then every question of the picture in a block of its own."""

    keep: list[np.ndarray]  # kept patches of each picture
    ids: torch.Tensor  # [b, t] question and answer tokens
    positions: torch.Tensor  # [b, 1 + v + t]
    segment: torch.Tensor  # [b, 1 + v + t]: 0 prefix, 1.. question, -1 padding
    target: torch.Tensor  # [b, t] next token to predict, -100 where none
    row: torch.Tensor  # [r, 2] (picture, index into t) of each question's last prompt token
    evidence: torch.Tensor  # [r, v] share of each kept patch covered by that question's evidence
    family: list[tuple[int, int, int, str]]  # picture, first and last target index, family


class Packer:
    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.eos = self.tokenizer.eos_token_id
        self.prompts: dict[str, list[int]] = {}

    def tokens(self, q: Question) -> tuple[list[int], list[int]]:
        if q.question not in self.prompts:
            text = prompt(q.question, image=False)
            self.prompts[q.question] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if q.family in ("reading", "text"):
            answer = spell(q.answer, self.tokenizer)
        else:
            answer = self.tokenizer(q.answer, add_special_tokens=False)["input_ids"]
        return self.prompts[q.question], [*answer, self.eos]

    def choose(self, questions: list[Question], rng: np.random.Generator) -> list[Question]:
        chosen: list[Question] = []
        for family, count in SHARE.items():
            pool = [q for q in questions if q.family == family]
            chosen += [pool[i] for i in rng.permutation(len(pool))[:count]]
        return chosen

    def stepping_stones(self, questions: list[Question], rng: np.random.Generator) -> list[Question]:
        """Colour and place asked openly, "what is the cat?", "where is the cat?": training only, no family of its own.

        From yes and no alone, these comparisons start late: the reader must already know what to compare.
        """
        true = [q for q in questions if q.kind in ("colour", "position") and q.answer == "yes"]
        stones = []
        for i in rng.permutation(len(true))[:6]:
            _, _, name, *_, said = true[i].question.rstrip("?").split(" ")
            ask, answer = "what", said
            if true[i].kind == "position":
                weight = true[i].evidence.reshape(GRID, GRID).astype(float)
                row, column = (float(np.average(np.arange(GRID), weights=weight.sum(axis))) for axis in (1, 0))
                ask = "where"
                answer = f"{('top', 'bottom')[row > (GRID - 1) / 2]} {('left', 'right')[column > (GRID - 1) / 2]}"
            stones.append(Question("perception", "stone", f"{ask} is the {name}?", answer, true[i].evidence))
        return stones

    def pack(self, asked: list[list[Question]], keep: list[np.ndarray], renumber: bool) -> Packed:
        v = len(keep[0])
        ids, positions, segments, targets, rows, evidence, families = [], [], [], [], [], [], []
        for b, questions in enumerate(asked):
            line: list[int] = []
            goal: list[int] = []
            place = [0, *(range(1, 1 + v) if renumber else (1 + keep[b]).tolist())]
            first = 1 + (v if renumber or v == 0 else N)
            segment = [0] * (1 + v)
            for s, q in enumerate(questions, 1):
                ask, answer = self.tokens(q)
                start = len(line) + len(ask) - 1
                families.append((b, start, start + len(answer), q.family))
                if v and q.evidence[keep[b]].max(initial=0) > 40:
                    rows.append((b, start))
                    evidence.append(q.evidence[keep[b]].astype(np.float32) / 255)
                line += [*ask, *answer[:-1]]
                goal += [-100] * (len(ask) - 1) + answer
                segment += [s] * (len(ask) + len(answer) - 1)
                place += range(first, first + len(ask) + len(answer) - 1)
            ids.append(line)
            positions.append(place)
            segments.append(segment)
            targets.append(goal)
        t = max(len(line) for line in ids)
        pad = lambda rows, width, value: torch.tensor([r + [value] * (width - len(r)) for r in rows])  # noqa: E731
        return Packed(
            keep=keep,
            ids=pad(ids, t, 0),
            positions=pad(positions, 1 + v + t, 0),
            segment=pad(segments, 1 + v + t, -1),
            target=pad(targets, t, -100),
            row=torch.tensor(rows).reshape(-1, 2),
            evidence=torch.from_numpy(np.array(evidence, np.float32).reshape(len(rows), v)),
            family=families,
        )


def block_mask(segment: torch.Tensor) -> torch.Tensor:
    """Boolean attention mask [b, 1, l, l]: causal; the prefix is seen by all, a question only by itself."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    return ((same | (segment[:, None, :] == 0)) & causal)[:, None]


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


def drop(evidence: list[list[Question]], rng: np.random.Generator, enabled: bool) -> list[np.ndarray]:
    """Which patches each picture of the batch keeps: all, a random share, or pieces plus a random share; or none."""
    b, u = len(evidence), rng.random()
    if u < 0.04:
        return [np.arange(0)] * b
    if not enabled or u < 0.35:
        return [np.arange(N)] * b
    k = max(6, round(N * float(np.exp(rng.uniform(np.log(0.06), np.log(0.8))))))
    kept = []
    for questions in evidence:
        order = rng.random(N)
        if u > 0.7:  # whole pieces first: the evidence of some of the questions
            for i in rng.permutation(len(questions))[: int(rng.integers(1, 7))]:
                order += 2.0 * (questions[i].evidence > 40)
        kept.append(np.sort(np.argpartition(-order, k - 1)[:k]))
    return kept


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
def score(model, tagger, packer: Packer, shard: dict, pictures: int, keep: int | None = None) -> dict[str, float]:
    """Share of questions whose every answer token is the model's first choice, by family (teacher-forced)."""
    rng = np.random.default_rng(5)
    right: dict[str, list[bool]] = {f: [] for f in FAMILIES}
    for start in range(0, pictures, 16):
        asked = [packer.choose(q, rng) for q in shard["questions"][start : start + 16]]
        pixels = (torch.from_numpy(shard["images"][start : start + 16]).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        whole = [np.arange(N) if keep is None else np.sort(rng.permutation(N)[:keep]) for _ in asked]
        packed = packer.pack(asked, whole, renumber=False)
        features = tagger.tower(pixels).last_hidden_state[:, 1:]
        hit = torch.zeros_like(packed.target, dtype=torch.bool)
        hit[packed.target >= 0] = forward(model, features, packed).argmax(-1) == packed.target[packed.target >= 0]
        for b, first, last, family in packed.family:
            right[family].append(bool(hit[b, first:last].all()))
    return {f: round(float(np.mean(r)), 3) for f, r in right.items()}


def load_tagger(out: Path) -> Tagger:
    state = torch.load(out / "tower.pt", weights_only=False)
    tagger = Tagger(tower_config())
    tagger.load_state_dict(state["model"])
    return tagger.eval().requires_grad_(False)


def train(
    pool: Path,
    out: Path,
    name: str,
    steps: int,
    *,
    dropping: bool,
    batch: int,
    rate: float,
    tag_rate: float,
    hint: float,
    start: str,
    snapshot: int,
    stop: int,
) -> None:
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tagger, packer = load_tagger(out), Packer()
    model = build_model(tagger.tower.config)
    model.model.vision_tower = tagger.tower
    start_aligned(model, {n: h.state_dict()["weight"] for n, h in tagger.heads.items()}, HEADS)
    hints = AttentionRows(model, HINT_LAYERS)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    tagger.requires_grad_(True).train()
    tag_optimiser = torch.optim.AdamW(tagger.parameters(), lr=tag_rate, weight_decay=0.05, betas=(0.9, 0.98))
    spent, step, asked_total = 0.0, 0, 0
    checkpoint = out / f"{name}.pt"
    recipe: dict[str, object] = {
        "dropping": dropping,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "tag_rate": tag_rate,
    }
    recipe |= {"hint": hint, "start": start}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        if state["recipe"] != recipe:
            raise SystemExit(f"{checkpoint} was trained with {state['recipe']}, not {recipe}: type another --name")
        model.load_state_dict(state["model"])
        tagger.load_state_dict(state["tagger"])
        optimiser.load_state_dict(state["optimiser"])
        tag_optimiser.load_state_dict(state["tag_optimiser"])
        spent, step, asked_total = state["spent"], state["step"], state["asked"]
        rng.bit_generator.state = state["rng"]
        print(f"resuming at step {step}, {spent / 60:.1f} minutes spent", flush=True)
    elif start:
        state = torch.load(out / f"{start}.pt", weights_only=False)
        model.load_state_dict(state["model"])
        tagger.load_state_dict(state["tagger"])
        rng = np.random.default_rng(2)  # other pictures and questions than the first run's

    def save(path: Path = checkpoint) -> None:
        save_checkpoint(
            path,
            recipe=recipe,
            model=model.state_dict(),
            tagger=tagger.state_dict(),
            optimiser=optimiser.state_dict(),
            tag_optimiser=tag_optimiser.state_dict(),
            rng=rng.bit_generator.state,
            spent=spent,
            step=step,
            asked=asked_total,
        )

    val = load_shard(shards(pool, "val")[0])
    clock = saved = time.monotonic()
    recent: dict[str, list[float]] = {"loss": [], "hint": [], "tagging": []}
    shard, order = {}, np.arange(0)
    while step < min(steps, stop or steps):
        if len(order) < batch:
            files = shards(pool, "train")
            shard = load_shard(files[rng.integers(len(files))])
            order = rng.permutation(len(shard["images"]))
        pictures, order = order[:batch], order[batch:]
        done = step / steps
        decay = min(1.0, 0.85 * (1 + math.cos(math.pi * done)))  # flat for two fifths of the run, then a cosine
        for used, top in ((optimiser, rate), (tag_optimiser, tag_rate)):
            used.param_groups[0]["lr"] = top * min(1.0, (step + 1) / 150) * (0.02 + 0.98 * decay)
        pools = [shard["questions"][i] for i in pictures]
        asked = [packer.choose(pool, rng) + packer.stepping_stones(pool, rng) for pool in pools]
        packed = packer.pack(asked, drop(asked, rng, dropping), renumber=bool(rng.random() < 0.25))
        with torch.autocast("cpu", torch.bfloat16):
            features, tags = tagger.tag(augment(shard["images"][pictures], rng))
            tagging = tag_loss(tags, torch.from_numpy(shard["labels"][pictures]))
            logits = forward(model, features.detach(), packed)
            loss = F.cross_entropy(logits, packed.target[packed.target >= 0])
            total, weight = loss, hint * max(0.0, 1 - done / 0.5)
            if weight and len(packed.row):
                missed = -torch.stack(hints.mass(packed)).mean()
                recent["hint"].append(float(missed.detach()))
                total = total + weight * missed
        for used, goal, parameters in ((optimiser, total, weights), (tag_optimiser, tagging, [*tagger.parameters()])):
            used.zero_grad()
            goal.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            used.step()
        step, asked_total = step + 1, asked_total + len(packed.family)
        recent["loss"].append(float(loss.detach()))
        recent["tagging"].append(float(tagging.detach()))
        now = time.monotonic()
        spent, clock = spent + now - clock, now
        if step % 50 == 0:
            line: dict[str, object] = {"step": step, "minutes": round(spent / 60, 2), "questions": asked_total}
            line |= {k: round(float(np.mean(x)), 3) for k, x in recent.items() if x}
            recent = {"loss": [], "hint": [], "tagging": []}
            if step % 250 == 0:
                model.eval()
                line["val"] = score(model, tagger, packer, val, 64)
                model.train()
            print(json.dumps(line), flush=True)
        if step == snapshot:
            save(out / f"{name}-{step}.pt")
        if now - saved > 120:
            save()
            saved = now
    save()
    model.eval()
    report: dict[str, object] = {"minutes": spent / 60, "steps": step, "questions": asked_total, "dropping": dropping}
    report["val"] = score(model, tagger, packer, val, 320)
    print(json.dumps(report), flush=True)
    disk.write(out / f"{name}.json", json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path, help="folder with tower.pt; the reader's checkpoint is written there")
    parser.add_argument("--name", default="reader")
    parser.add_argument("--steps", type=int, default=4000, help="length of the whole schedule")
    parser.add_argument("--stop", type=int, default=0, help="stop after this many steps of the schedule")
    parser.add_argument("--snapshot", type=int, default=0, help="also keep the checkpoint of this step")
    parser.add_argument("--no-drop", action="store_true", help="never drop visual tokens in training (the ablation)")
    parser.add_argument("--start", default="", metavar="NAME", help="start from this finished run instead of anew")
    parser.add_argument("--hint", type=float, default=0.3, help="first weight of the hint at where to look")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--tag-rate", type=float, default=3e-4, help="learning rate of the tower and its tags")
    args = parser.parse_args()
    train(
        args.pool,
        args.out,
        args.name,
        args.steps,
        dropping=not args.no_drop,
        batch=args.batch,
        rate=args.rate,
        tag_rate=args.tag_rate,
        hint=args.hint,
        start=args.start,
        snapshot=args.snapshot,
        stop=args.stop,
    )


if __name__ == "__main__":
    main()
