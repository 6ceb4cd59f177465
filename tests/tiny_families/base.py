"""What a tiny family is: a config, how one picture looks to it, and how pictures make a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tiny_models import pad

PAD, BOS, EOS = 0, 1, 2
WORDS = range(3, 90)  # what text is made of; above it are markers
START, END, BREAK, VIDEO, IMAGE = 91, 92, 93, 97, 98
VOCABULARY = 99
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,  # else a tiny model mostly says its last word again
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
}
Samples = list[list["Picture"]]


@dataclass(frozen=True)
class Picture:
    """One image or video of a prompt.

    Attributes:
        ids: its tokens, with the markers that stand in between and around.
        sizes: rows of each visual item in it: one for most families, one a tile for others.
        tensors: its part of each input, to be put together by `Tiny.collate`.
        video: whether it is a video.
    """

    ids: list[int]
    sizes: list[int]
    tensors: dict[str, Tensor]
    video: bool = False


def joined(samples: Samples) -> dict[str, Tensor]:
    """Every input in one tensor: the parts of all pictures of all samples, one after the other."""
    pictures = [picture for sample in samples for picture in sample]
    names = dict.fromkeys(name for picture in pictures for name in picture.tensors)
    return {name: torch.cat([p.tensors[name] for p in pictures if name in p.tensors]) for name in names}


def no_types(ids: Tensor) -> dict[str, Tensor]:
    return {}


def modality_types(ids: Tensor) -> dict[str, Tensor]:
    """0 text, 1 image, 2 video."""
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


@dataclass(frozen=True)
class Tiny:
    """A tiny random model of one family and the inputs it takes.

    Attributes:
        model_type: the family.
        config: keywords of its config; {} entries may be nested configs.
        picture: makes one image from a generator.
        collate: puts the tensors of a batch's pictures together.
        types: makes the per-token types from the ids.
        video: makes one video, for families that take any.
        tolerance: absolute and relative, of logits that spread over about +-10.
        embedding: scale of the embedding table; Gemmas multiply it by the root of the hidden size.
        uneven: the end of the name of a norm's weights that are made unequal: where a norm makes the rows, all would
            be equally long.
        changed: changes the model before it gets its weights, where a size is no argument of the config.
    """

    model_type: str
    config: dict[str, Any]
    picture: Callable[[torch.Generator], Picture]
    collate: Callable[[Samples], dict[str, Tensor]] = joined
    types: Callable[[Tensor], dict[str, Tensor]] = no_types
    video: Callable[[torch.Generator], Picture] | None = None
    tolerance: float = 3e-5
    embedding: float = 1.0
    uneven: str | None = None
    changed: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Batch:
    """Inputs of a batch and what is in it."""

    inputs: dict[str, Tensor]
    sizes: list[list[int]]  # rows of each visual item of each sample, in prompt order


def make(tiny: Tiny, images: list[int], words: list[int], seed: int = 1, side: str = "left", only: int = -1) -> Batch:
    """A batch: sample b has `images[b]` pictures and `words[b]` text tokens, around and behind them.

    The same (seed, b) gives the same prompt and pixels in any batch; `only` leaves one sample. An
    entry of `images` may be a string instead, "iv" for an image and then a video.
    """
    rows: list[list[int]] = []
    samples: Samples = []
    for sample, (count, length) in enumerate(zip(images, words, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + sample)
        text = torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist()
        kinds = count if isinstance(count, str) else "i" * count
        pictures, row = [], [BOS]
        for kind in kinds:
            picture = tiny.video(generator) if kind == "v" and tiny.video else tiny.picture(generator)
            pictures.append(picture)
            row += [text.pop(), *picture.ids]
        if only in (-1, sample):
            rows.append(row + text)
            samples.append(pictures)
    inputs = pad(rows, side)
    inputs |= tiny.types(inputs["input_ids"])
    if any(samples):
        inputs |= tiny.collate(samples)
    return Batch(inputs, [[n for picture in sample for n in picture.sizes] for sample in samples])


@cache
def _built(model_type: str, changes: tuple[tuple[str, Any], ...], attention: str, seed: int) -> Any:
    from tiny_families import TINY  # the table imports this file

    torch.manual_seed(seed)
    tiny = TINY[model_type]
    config = AutoConfig.for_model(model_type, **{"tie_word_embeddings": False} | _copied(tiny.config))
    for name, value in changes:
        setattr(config.get_text_config(), name, list(value) if isinstance(value, tuple) else value)
    model = AutoModelForImageTextToText.from_config(config)
    if tiny.changed:
        tiny.changed(model)
    generator = torch.Generator().manual_seed(7 + seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = (
                    tiny.embedding if "embed" in name else 0.4 if "lm_head" in name else 1.6 / weight.shape[-1] ** 0.5
                )
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif tiny.uneven and name.endswith(tiny.uneven):
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None  # always the asked number of tokens
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD, BOS, EOS, *range(WORDS.stop, VOCABULARY)]
    return model.eval()


def build(model_type: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """The family's tiny model, made once; `changes` are attributes of its text config."""
    return _built(model_type, tuple(sorted(changes.items())), attention, seed)


def _copied(config: Any) -> Any:
    """Nested dicts copied: transformers takes entries out of what it is given."""
    return {name: _copied(value) for name, value in config.items()} if isinstance(config, dict) else config


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def one_of(generator: torch.Generator, choices: list) -> Any:
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]
