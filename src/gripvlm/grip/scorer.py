"""The budget-aware scorer: one logit for each visual token, given the question and how many will be kept.

A narrow pre-norm transformer over the projected visual features: self-attention between visual tokens,
cross-attention to the question's token embeddings, and the budget as a shift and scale of every block
(FiLM, Perez et al. 2018). GRIP-VLM (arXiv 2605.13375) names a "budget-aware scorer" and publishes no
architecture; every choice below is ours:

1. Both kinds of tokens enter through the same projection: visual features after the projector live in the
   space of the word embeddings, so that a word and the patch that shows it start out alike.
2. The budget enters as log(k / n), as sines and cosines of several scales.
3. Coordinates are fractions of the image, so any grid size and aspect ratio is served.
4. Each image of a prompt is scored by itself, or (`joint`) all tokens of a prompt as one sequence in which each knows
   its image: 0.05 % of the FLOPs of a 7B prefill at 2,880 tokens, where images apart are 0.025 %.
5. A stage inside the vision tower (`TowerStage`), where there is one, is a second such transformer.
6. With several `rounds` the trunk runs once; in later rounds a token loses lambda times its closeness to the nearest
   kept one (`rounds`), lambda a function of the budget.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from gripvlm.errors import InputError
from gripvlm.grip.blocks import Block, Diversity
from gripvlm.grip.closeness import Closeness
from gripvlm.grip.fingerprint import ModelFingerprint, ScorerError
from gripvlm.grip.rounds import Penalty
from gripvlm.utils import disk
from gripvlm.utils.strict_json import BadJSON, read

FORMAT = "gripvlm.scorer/1"
SCORER_FILES = ("model.safetensors", "config.json")

_PLACES, _ORDERS, _BUDGETS, _IMAGES = 6, 6, 5, 6  # octaves of coordinates, word order, log budget and image number

_MODEL_CARD = """---
{{ card_data }}
---

# A Grip scorer

It chooses which visual tokens of one vision-language model stay; `config.json` says which model and how it was trained.

```python
import gripvlm

grip = gripvlm.Grip.from_pretrained("this-repository")
with gripvlm.prune(model, grip, keep=0.1):
    model.generate(**inputs)
```
"""


@dataclass(frozen=True)
class ScorerConfig:
    """The scorer's sizes.

    Attributes:
        features: d, the width of the language model's embeddings.
        width, blocks, heads: of the scorer's transformer.
        question: whether it reads the question. A scorer that does not gives one ranking an image and
            budget, which a server can keep.
        budget: whether it reads the budget; False is the ablation.
        joint: one budget for all images of a prompt, which compete for it; else one for each image.
        rounds: in how many the tokens are chosen; in all but the first, tokens lose by being like kept ones.
        tower_block: the block of the vision tower before which a first stage chooses; -1 for none.
        tower_features: the width of the hidden states there; 0 for none.
    """

    features: int
    width: int = 128
    blocks: int = 3
    heads: int = 4
    question: bool = True
    budget: bool = True
    joint: bool = False
    rounds: int = 1
    tower_block: int = -1
    tower_features: int = 0

    def __post_init__(self) -> None:
        sizes = (self.features, self.width, self.blocks, self.heads, self.rounds)
        switches = (self.question, self.budget, self.joint)
        if any(type(size) is not int for size in sizes) or any(type(switch) is not bool for switch in switches):
            raise InputError(f"{self}: sizes are whole numbers; question, budget and joint are true or false")
        if min(sizes) < 1 or self.width % self.heads:
            raise InputError(f"{self}: sizes must be positive, and heads must divide width")
        if any(type(size) is not int for size in (self.tower_block, self.tower_features)):
            raise InputError(f"{self}: tower_block and tower_features are whole numbers")
        if (self.tower_block < 0) != (self.tower_features <= 0):
            raise InputError(f"{self}: tower_block and tower_features belong together")


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


class Scorer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="gripvlm",
    tags=["visual-token-pruning"],
    model_card_template=_MODEL_CARD,
):
    """Logits [B, n] of visual tokens; higher is kept.

    `base` is the model it belongs to (None for one that was not trained), `notes` what training recorded.
    """

    def __init__(self, config: ScorerConfig, base: ModelFingerprint | None = None) -> None:
        super().__init__()
        self.config, self.base = config, base
        self.notes: dict[str, Any] = {}
        width = config.width
        # Modules keep these names: they are those of saved weights, and part of `digest`.
        self.enter = nn.Sequential(nn.LayerNorm(config.features), nn.Linear(config.features, width))
        self.place = nn.Linear(4 * _PLACES, width)
        # Distinguishes visual tokens [0] from words [1], which share a projection.
        self.kind = nn.Parameter(torch.zeros(2, width))
        if config.question:
            self.order = nn.Linear(2 * _ORDERS, width)
            self.reader = Block(width, config.heads, cross=False, film=False)
        if config.budget:
            self.budget = nn.Sequential(nn.Linear(2 * _BUDGETS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            Block(width, config.heads, cross=config.question, film=config.budget) for _ in range(config.blocks)
        )
        self.leave = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        # Logits near 0: a new scorer explores evenly.
        nn.init.normal_(self.score.weight, std=0.02)
        if config.joint:
            self.image = nn.Linear(2 * _IMAGES, width)
            nn.init.zeros_(self.image.weight)  # all images alike at first
            nn.init.zeros_(self.image.bias)
        if config.rounds > 1:
            self.diversity = Diversity(width)
        if config.tower_features:
            self.tower = TowerStage(config)

    def with_tower(self, block: int, features: int) -> Scorer:
        """This scorer with a new stage inside the vision tower, which starts from its weights."""
        config = replace(self.config, tower_block=block, tower_features=features)
        scorer = Scorer(config, self.base)
        own = self.state_dict()
        scorer.load_state_dict(own, strict=False)
        # All but what tells the images of a prompt apart: inside the tower each is by itself.
        scorer.tower.scorer.load_state_dict({name: own[name] for name in scorer.tower.scorer.state_dict()})
        scorer.notes = self.notes
        return scorer

    def forward(
        self,
        features: Tensor,
        places: Tensor,
        fraction: Tensor,
        valid: Tensor | None = None,
        question: Tensor | None = None,
        question_mask: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """[B, n] float32 logits, -inf at padding, of sequences: an image's tokens, or (`joint`) those of a prompt.

        Args:
            features: [B, n, d] projected visual features.
            places: [B, n, 2] from `coordinates`.
            fraction: [B] k / n, in (0, 1].
            valid: [B, n] bool, False at padding; None for none.
            question: [B, t, d] token embeddings, if the scorer reads them.
            question_mask: [B, t] bool, False at padding; None for none.
            images: [B, n] the number of each token's image in its prompt; None: all of image 0.

        Raises:
            InputError: no question, for a scorer that reads it.
        """
        dtype = self.kind.dtype  # waves are made in float32: a bfloat16 scorer would not tell neighbours apart
        where = _waves(places, _PLACES, math.pi / 2).flatten(-2).to(dtype)
        x = self.enter(features.to(dtype)) + self.place(where) + self.kind[0]
        if self.config.joint:
            number = features.new_zeros(1, 1, dtype=torch.float32) if images is None else images.float()
            x = x + self.image(_waves(number, _IMAGES, math.pi / 32).to(dtype))
        words, words_mask = None, None
        if self.config.question:
            if question is None:
                raise InputError("this scorer reads the question: pass question [B, t, d], or train one without")
            words, words_mask = self._read(question.to(dtype), question_mask)
        film = self._film(fraction)
        x_mask = None if valid is None else valid[:, None, None]
        for block in self.blocks:
            x = block(x, x_mask, words, words_mask, film)
        logits: Tensor = self.score(self.leave(x)).squeeze(-1).float()
        return logits if valid is None else logits.masked_fill(~valid, -torch.inf)

    def penalty(self, fraction: Tensor, close: Closeness) -> Penalty:
        """What tokens lose in later rounds; `fraction` [B] as in `forward`."""
        if self.config.rounds == 1:
            return Penalty(1, torch.zeros_like(fraction, dtype=torch.float32), close)
        return Penalty(self.config.rounds, self.diversity(self._film(fraction)).expand(len(fraction)), close)

    def _film(self, fraction: Tensor) -> Tensor | None:
        """[B, width] what blocks are told of a budget [B]; None where the scorer does not read it."""
        if not self.config.budget:
            return None
        film: Tensor = self.budget(_waves(fraction.float().log(), _BUDGETS, math.pi / 8).to(self.kind.dtype))
        return film

    def _read(self, question: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The question's hidden states [B, 1 + t, width] and their mask [B, 1, 1, 1 + t]."""
        steps = torch.arange(question.shape[1], device=question.device, dtype=torch.float32)
        order = self.order(_waves(steps, _ORDERS, math.pi / 32).to(question.dtype))
        words = self.enter(question) + order + self.kind[1]
        words = F.pad(words, (0, 0, 1, 0))  # a place to look at when nothing fits, and when there is no question
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None]
        return self.reader(words, mask), mask

    @property
    def parameters_count(self) -> int:
        """The number of trained weights."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def digest(self) -> str:
        """A short hash of all weights in half precision, the same for a scorer and its half-precision copy."""
        seen = hashlib.blake2b(digest_size=6)
        for name, weight in sorted(self.state_dict().items()):
            seen.update(name.encode() + weight.half().cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()

    # --- folders and the hub: `save_pretrained` and `push_to_hub` are PyTorchModelHubMixin's ------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes `model.safetensors`, in the scorer's dtype, and `config.json`."""
        # The mixin writes the file in place; here a temporary file is moved into place, so that no half file remains.
        weights = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        disk.write(save_directory / SCORER_FILES[0], save(weights))
        about = {
            "format": FORMAT,
            "scorer": _sizes(self.config),
            "base": None if self.base is None else asdict(self.base),
            "notes": self.notes,
        }
        # Last, so that a folder with a config.json is complete.
        disk.write(save_directory / SCORER_FILES[1], json.dumps(about, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Scorer:
        """From a folder that `save_pretrained` wrote, or a hub id, in float32.

        Args:
            hub: further arguments for `huggingface_hub.hf_hub_download`, such as `revision`.

        Raises:
            ScorerError: neither, or files of another format.
        """
        name = str(pretrained_model_name_or_path)
        folder = _fetch(name, hub)
        weights_file, config_file = (folder / file for file in SCORER_FILES)
        try:
            about = read(config_file)
            weights = {key: value.float() for key, value in load(disk.read_bytes(weights_file)).items()}
        except FileNotFoundError:
            missing = [file.name for file in (config_file, weights_file) if not file.is_file()]
            raise ScorerError(f"{name} holds no scorer: {' and '.join(missing)} missing") from None
        except BadJSON as error:
            raise ScorerError(f"{config_file} is not JSON that can be used (it {error}): copy it again") from None
        except SafetensorError as error:
            raise ScorerError(f"{weights_file} is damaged ({error}): copy it again") from None
        written = about.get("format") if isinstance(about, dict) else None
        if written != FORMAT:
            raise ScorerError(f"{name} has format {written!r}, this gripvlm reads {FORMAT!r}: update it")
        known = {each.name for each in fields(ScorerConfig)}
        if isinstance(about.get("scorer"), dict) and (unknown := sorted(about["scorer"].keys() - known)):
            raise ScorerError(
                f"{config_file} has {', '.join(unknown)}, which this gripvlm does not know: another version wrote it, "
                "or one between releases; update gripvlm, or train the scorer again with `gripvlm train`"
            )
        try:
            base = None if about["base"] is None else ModelFingerprint.read(about["base"])
            config, notes = ScorerConfig(**about["scorer"]), dict(about["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ScorerError(f"{config_file} is damaged ({type(error).__name__}: {error}): copy it again") from None
        try:
            scorer = _assembled(cls, config, weights)
        except RuntimeError as error:
            raise ScorerError(
                f"{name}: {weights_file.name} does not fit {config_file.name} ({error}): copy both again"
            ) from None
        scorer.base, scorer.notes = base, notes
        return scorer.eval()


class TowerStage(nn.Module):
    """Logits of visual tokens inside the vision tower, from their hidden states and the question.

    A linear map brings the hidden states to the width of the language model's embeddings, where a scorer of the same
    sizes reads them. One image is one sequence: inside the tower all images have the same budget.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.lift = nn.Sequential(
            nn.LayerNorm(config.tower_features), nn.Linear(config.tower_features, config.features)
        )
        self.scorer = Scorer(replace(config, joint=False, tower_block=-1, tower_features=0))

    @property
    def config(self) -> ScorerConfig:
        return self.scorer.config

    def forward(self, features: Tensor, *others: Tensor | None) -> Tensor:
        """As `Scorer.forward`, of features [B, n, tower_features]."""
        logits: Tensor = self.scorer(self.lift(features.to(self.scorer.kind.dtype)), *others)
        return logits

    def penalty(self, fraction: Tensor, close: Closeness) -> Penalty:
        return self.scorer.penalty(fraction, close)


def _sizes(config: ScorerConfig) -> dict[str, Any]:
    """What config.json says of the sizes; of a stage inside the tower only where there is one, as ever."""
    sizes = asdict(config)
    return sizes if config.tower_features else {k: v for k, v in sizes.items() if not k.startswith("tower_")}


def _assembled(kind: type[Scorer], config: ScorerConfig, weights: dict[str, Tensor]) -> Scorer:
    """A scorer that owns these weights.

    Raises:
        RuntimeError: they are not those of the sizes in `config`.
    """
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if config.blocks != depth:
        raise RuntimeError(f"blocks = {config.blocks}, but there are {depth}")
    # Without memory for its own weights: a damaged config.json may describe terabytes of them.
    with torch.device("meta"):
        scorer = kind(config)
    scorer.load_state_dict(weights, assign=True)
    return scorer


def has_scorer(folder: Path) -> bool:
    """Whether the folder holds a completely saved scorer."""
    return (folder / SCORER_FILES[1]).exists()


def _fetch(name: str, hub: Mapping[str, Any]) -> Path:
    """The folder with a scorer's two files, downloaded where `name` is a hub id.

    Raises:
        ScorerError: there is no such folder, nor such a scorer on the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") != 1:
        raise ScorerError(f"no scorer {name!r}: pass a folder that exists, or a hub id such as user/grip-llava")
    try:
        paths = [hf_hub_download(name, file, **hub) for file in SCORER_FILES]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ScorerError(f"{name!r} is no folder here and no scorer on the hub: {first}") from error
    return Path(paths[0]).parent
