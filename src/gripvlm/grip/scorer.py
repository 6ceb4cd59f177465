"""The budget-aware scorer: one logit for each visual token, given the question and how many will be kept.

A narrow pre-norm transformer over the projected visual features: self-attention between visual tokens,
cross-attention to the question's token embeddings, and the budget as a shift and scale of every block
(FiLM, Perez et al. 2018). GRIP-VLM (arXiv 2605.13375) names a "budget-aware scorer" and publishes no
architecture; every choice below is ours:

1. Both kinds of tokens enter through the same projection: visual features after the projector live in the
   space of the word embeddings, so that a word and the patch that shows it start out alike.
2. The budget enters as log(k / n), as sines and cosines of several scales.
3. Coordinates are fractions of the image, so any grid size and aspect ratio is served.
4. Each image of a prompt is scored by itself, so any number of images is served.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from gripvlm.errors import InputError
from gripvlm.grip.fingerprint import ModelFingerprint, ScorerError
from gripvlm.utils import disk
from gripvlm.utils.strict_json import BadJSON, read

__all__ = ["ModelFingerprint", "Scorer", "ScorerConfig", "ScorerError", "coordinates"]

FORMAT = "gripvlm.scorer/1"
SCORER_FILES = _WEIGHTS, _CONFIG = "scorer.safetensors", "scorer.json"


@dataclass(frozen=True)
class ScorerConfig:
    """The scorer's sizes.

    Attributes:
        features: d, the width of the language model's embeddings.
        width, blocks, heads: of the scorer's transformer.
        question: whether it reads the question. A scorer that does not gives one ranking an image and
            budget, which a server can keep.
        budget: whether it is told the budget; False is the ablation.
    """

    features: int
    width: int = 128
    blocks: int = 3
    heads: int = 4
    question: bool = True
    budget: bool = True

    def __post_init__(self) -> None:
        sizes, switches = (self.features, self.width, self.blocks, self.heads), (self.question, self.budget)
        if any(type(size) is not int for size in sizes) or any(type(switch) is not bool for switch in switches):
            raise InputError(f"{self}: sizes are whole numbers, question and budget true or false")
        if min(self.features, self.width, self.blocks, self.heads) < 1 or self.width % self.heads:
            raise InputError(f"{self}: sizes must be positive, and heads must divide width")


def coordinates(n: int, grid: tuple[int, int] | None, device: torch.device | None = None) -> Tensor:
    """[n, 2] centres of the tokens as fractions (down, right) of the image; of one line where no grid is known."""
    h, w = grid or (1, n)
    down = (torch.arange(h, device=device) + 0.5) / h
    right = (torch.arange(w, device=device) + 0.5) / w
    return torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1).reshape(n, 2)


def _waves(values: Tensor, count: int, lowest: float) -> Tensor:
    """[..., 2 * count] sines and cosines of `values` at octaves from `lowest` radians a unit."""
    angles = values[..., None] * (lowest * 2.0 ** torch.arange(count, device=values.device, dtype=values.dtype))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Scorer(nn.Module):
    """Logits [B, n] of visual tokens; higher is kept.

    `base` is the model it belongs to (None for one that was not trained), `notes` what training recorded.
    """

    def __init__(self, config: ScorerConfig, base: ModelFingerprint | None = None) -> None:
        super().__init__()
        self.config, self.base = config, base
        self.notes: dict[str, Any] = {}
        width = config.width
        self.enter = nn.Sequential(nn.LayerNorm(config.features), nn.Linear(config.features, width))
        self.place = nn.Linear(4 * _PLACES, width)
        self.kind = nn.Parameter(torch.zeros(2, width))
        if config.question:
            self.order = nn.Linear(2 * _ORDERS, width)
            self.reader = _Block(width, config.heads, cross=False, film=False)
        if config.budget:
            self.budget = nn.Sequential(nn.Linear(2 * _BUDGETS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            _Block(width, config.heads, cross=config.question, film=config.budget) for _ in range(config.blocks)
        )
        self.leave = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(
        self,
        features: Tensor,
        places: Tensor,
        fraction: Tensor,
        valid: Tensor | None = None,
        question: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Scores a padded batch.

        Args:
            features: [B, n, d] projected visual features.
            places: [B, n, 2] from `coordinates`.
            fraction: [B] k / n, in (0, 1].
            valid: [B, n] bool, False at padding; None for none.
            question: [B, t, d] token embeddings, if the scorer reads them.
            asked: [B, t] bool, False at padding; None for none.

        Returns:
            [B, n] float32 logits, -inf at padding.
        """
        return self.judge(self.hidden(features, places, fraction, valid, question, asked), valid)

    def judge(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, n] logits of hidden states [B, n, width]."""
        logits = self.score(hidden).squeeze(-1).float()
        return logits if valid is None else logits.masked_fill(~valid, -torch.inf)

    def hidden(
        self,
        features: Tensor,
        places: Tensor,
        fraction: Tensor,
        valid: Tensor | None = None,
        question: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """[B, n, width] what the logits are made of; arguments as for `forward`."""
        dtype = self.kind.dtype  # waves are made in float32: a bfloat16 scorer would not tell neighbours apart
        seen, where = features.to(dtype), _waves(places, _PLACES, math.pi / 2).flatten(-2).to(dtype)
        x = self.enter(seen) + self.place(where) + self.kind[0]
        q, q_mask = None, None
        if self.config.question:
            if question is None:
                raise InputError("this scorer reads the question: pass question [B, t, d], or train one without")
            steps = torch.arange(question.shape[1], device=question.device, dtype=torch.float32)
            order = self.order(_waves(steps, _ORDERS, math.pi / 32).to(dtype))
            q = self.enter(question.to(dtype)) + order + self.kind[1]
            q = F.pad(q, (0, 0, 1, 0))  # a place to look at when nothing fits, and when nothing is asked
            q_mask = None if asked is None else F.pad(asked, (1, 0), value=True)[:, None, None]
            q = self.reader(q, q_mask)
        film = None
        if self.config.budget:
            film = self.budget(_waves(fraction.float().log(), _BUDGETS, math.pi / 8).to(dtype))
        x_mask = None if valid is None else valid[:, None, None]
        for block in self.blocks:
            x = block(x, x_mask, q, q_mask, film)
        hidden: Tensor = self.leave(x)
        return hidden

    @property
    def parameters_count(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def digest(self) -> str:
        """A short hash of all weights in half precision, the same for a scorer and its half-precision copy."""
        seen = hashlib.blake2b(digest_size=6)
        for name, weight in sorted(self.state_dict().items()):
            seen.update(name.encode() + weight.half().cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()

    def flops(self, n: int, t: int = 0) -> int:
        """Multiply-adds times two of one image of n tokens and a question of t."""
        c, w = self.config, self.config.width
        visual = 2 * n * w * (c.features + 4 * _PLACES + 1 + c.blocks * 12 * w) + c.blocks * 4 * n * n * w
        if c.budget:
            visual += 2 * w * (2 * _BUDGETS + w + c.blocks * 4 * w)
        if not c.question:
            return visual
        visual += c.blocks * (4 * n * w * w + 4 * (t + 1) * w * w + 4 * n * (t + 1) * w)
        return visual + 2 * t * w * (c.features + 2 * _ORDERS) + (t + 1) * w * (24 * w + 4 * (t + 1))

    # --- folders and the hub ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `scorer.safetensors`, in `dtype`, and `scorer.json` into `folder`, which is made where missing."""
        folder = Path(folder)
        weights = {name: value.detach().to(dtype).contiguous().cpu() for name, value in self.state_dict().items()}
        disk.write(folder / _WEIGHTS, save(weights))
        about = {
            "format": FORMAT,
            "scorer": asdict(self.config),
            "base": None if self.base is None else asdict(self.base),
            "notes": self.notes,
        }
        disk.write(folder / _CONFIG, json.dumps(about, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> Scorer:
        """From a folder that `save_pretrained` wrote, or a hub id.

        Args:
            hub: further arguments for `huggingface_hub.hf_hub_download`, such as `revision`.

        Raises:
            ScorerError: neither, or files of another format.
        """
        folder = _fetched(str(name), hub)
        try:
            about = read(folder / _CONFIG)
            weights = load(disk.read_bytes(folder / _WEIGHTS))
        except FileNotFoundError:
            lacking = [file for file in (_CONFIG, _WEIGHTS) if not (folder / file).is_file()]
            raise ScorerError(f"{name} holds no scorer: {' and '.join(lacking)} missing") from None
        except BadJSON as error:
            raise ScorerError(f"{folder / _CONFIG} is not JSON that can be used (it {error}): copy it anew") from None
        except SafetensorError as error:
            raise ScorerError(f"{folder / _WEIGHTS} is damaged ({error}): copy it anew") from None
        written = about.get("format") if isinstance(about, dict) else None
        if written != FORMAT:
            raise ScorerError(f"{name} has format {written!r}, this gripvlm reads {FORMAT!r}: update it")
        try:
            base = None if about.get("base") is None else ModelFingerprint.read(about["base"])
            config, notes = ScorerConfig(**about["scorer"]), about.get("notes", {})
            if not isinstance(notes, dict):
                raise TypeError("notes is no object")
        except (KeyError, TypeError, ValueError) as error:
            raise ScorerError(
                f"{folder / _CONFIG} is damaged ({type(error).__name__}: {error}): copy it anew"
            ) from None
        if unlike := _unlike(config, {key: tuple(value.shape) for key, value in weights.items()}):
            raise ScorerError(f"{name}: {_WEIGHTS} does not fit {_CONFIG} ({unlike}): copy both anew")
        scorer = cls(config, base)
        scorer.load_state_dict({key: value.float() for key, value in weights.items()})
        scorer.notes = notes
        return scorer.eval()

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads it to the Hugging Face hub, creating the repository where needed; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        private = options.pop("private", None)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def _unlike(config: ScorerConfig, there: Mapping[str, tuple[int, ...]]) -> str:
    """What of the weights is not as the sizes say, "" for nothing; known before anything of these sizes is made."""
    depth = len({key.split(".")[1] for key in there if key.startswith("blocks.")})
    if config.blocks != depth:
        return f"blocks = {config.blocks}, but there are {depth}"
    if there.get("enter.1.weight") != (config.width, config.features):
        return (
            f"width = {config.width}, features = {config.features}, but enter.1.weight is {there.get('enter.1.weight')}"
        )
    with torch.device("meta"):
        asked = {key: tuple(value.shape) for key, value in Scorer(config).state_dict().items()}
    for key in sorted(asked.keys() | there.keys()):
        if asked.get(key) != there.get(key):
            return f"{key} is {there.get(key, 'missing')}, expected {asked.get(key, 'nothing of the name')}"
    return ""


def _fetched(name: str, hub: Mapping[str, Any]) -> Path:
    """The folder with a scorer's two files."""
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        if not folder.is_dir():
            raise ScorerError(f"no scorer {name!r}: type a folder that exists, or a hub id such as user/grip-llava")
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(name, file, **hub) for file in (_CONFIG, _WEIGHTS)]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ScorerError(f"{name!r} is no folder here and no scorer on the hub: {first}") from error
    return Path(paths[0]).parent


_PLACES, _ORDERS, _BUDGETS = 6, 6, 5  # octaves of coordinates, word order and log budget


class _Block(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP, the first and last shifted and scaled by the budget."""

    def __init__(self, width: int, heads: int, cross: bool, film: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if cross:
            self.ask, self.words, self.told = (
                nn.Linear(width, width),
                nn.Linear(width, 2 * width),
                nn.Linear(width, width),
            )
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if film:
            self.film = nn.Linear(width, 4 * width)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        q: Tensor | None = None,
        q_mask: Tensor | None = None,
        film: Tensor | None = None,
    ) -> Tensor:
        shifts: Sequence[Tensor | float] = (0.0, 0.0, 0.0, 0.0)
        if film is not None:
            shifts = self.film(film)[:, None].chunk(4, dim=-1)
        y = self.norms[0](x) * (1 + shifts[0]) + shifts[1]
        mine, keys, values = self.qkv(y).chunk(3, dim=-1)
        x = x + self.out(self._attend(mine, keys, values, mask))
        if q is not None:
            keys, values = self.words(q).chunk(2, dim=-1)
            x = x + self.told(self._attend(self.ask(self.norms[2](x)), keys, values, q_mask))
        return x + self.mlp(self.norms[1](x) * (1 + shifts[2]) + shifts[3])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled dot-product attention by heads; mask [B, 1, 1, keys] bool."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
