"""`lab-dense`: the first lab's model with more words, more layers and prompts of up to four pictures."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from gripvlm import lab
from lab_vlm import vlm
from lab_vlm.questions import NUMBERS as FIRST_NUMBERS

from .questions import NUMBERS, ORDINALS

_WORDS = (
    *("are", "more", "or", "many", "most", "colour", "which", "picture", "pictures", "has", "not", "both"),
    *("thing", "things", "icon", "icons", "letter", "letters", "numbers", "largest", "smallest"),
    *ORDINALS,
    *(n for n in NUMBERS if n not in FIRST_NUMBERS),
)
POSITIONS = 4096

# Several pictures are named, so that a question can be about one of them. One picture reads as in the first lab.
CHAT_TEMPLATE = (
    "{% set names = ['first', 'second', 'third', 'fourth'] %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set count = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set shown = namespace(images=0) %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{% if count > 1 %}{{ names[shown.images] }} {% endif %}<image> {% set shown.images = shown.images + 1 %}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} answer:{% else %} </s>{% endif %}"
    "{% endfor %}"
)


def prompt(question: str, pictures: int) -> str:
    """The text `lab-dense` is trained on; what its chat template makes of one user turn."""
    names = [f"{name} <image> " for name in ORDINALS[:pictures]] if pictures > 1 else ["<image> "] * pictures
    return f"{''.join(names)}{question} answer:"


def vocabulary() -> list[str]:
    """The first lab's words in their order, then the new ones: old embeddings keep their rows."""
    return list(dict.fromkeys([*vlm.vocabulary(), *_WORDS]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    return vlm.build_tokenizer(vocabulary(), POSITIONS)


def build_processor() -> LlavaProcessor:
    return vlm.build_processor(build_tokenizer(), CHAT_TEMPLATE)


@torch.no_grad()
def build_model(layers: int = 8) -> LlavaForConditionalGeneration:
    """The first lab's trained model, made deeper: what it answers is unchanged until it is trained further.

    New layers come last and add nothing at first (their output projections are zero). New words start near the mean
    of the old ones.
    """
    first = lab.load()[0]
    config = first.config
    had = config.text_config.num_hidden_layers
    config.text_config.num_hidden_layers = layers
    config.text_config.vocab_size = len(vocabulary())
    config.text_config.max_position_embeddings = POSITIONS
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    state = {k: v for k, v in first.state_dict().items() if not re.search(r"embed_tokens|lm_head", k)}
    model.load_state_dict(state, strict=False)
    table, old = model.get_input_embeddings().weight, first.get_input_embeddings().weight
    table.copy_(old.mean(0) + 0.25 * torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    table[: len(old)] = old
    model.tie_weights()
    for layer in model.model.language_model.layers[had:]:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model
