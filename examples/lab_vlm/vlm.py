"""The lab VLM: tokenizer, processor and a stock LlavaForConditionalGeneration around the lab's tower."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gripvlm.lab.tower import LabVisionConfig

from . import art
from .questions import NUMBERS
from .scenes import DEVICES, PATCH, SIZE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = (
    *("is", "there", "a", "an", "the", "at", "left", "right", "top", "bottom", "big", "small", "do", "you", "see"),
    *("what", "comes", "after", "before", "does", "point", "to", "where", "how", "warm", "in", "missing", "eats"),
    *("group", "choose", "read", "word", "number", "sign", "written", "next", "answer", "yes", "no"),
)
MEAN, STD = 0.5, 0.25

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} answer:{% else %} </s>{% endif %}"
    "{% endfor %}"
)


def prompt(question: str, image: bool = True) -> str:
    """The text the lab VLM was trained on; what its chat template makes of one user turn."""
    return f"{'<image> ' if image else ''}{question} answer:"


def vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [
        *_WORDS,
        *art.CLASSES,
        *art.COLOURS,
        *DEVICES,
        *(s for states in DEVICES.values() for s in states),
        *NUMBERS,
    ]
    return list(dict.fromkeys([*SPECIAL, *"?:,.", *letters, *(f"##{c}" for c in letters), *words]))


def build_tokenizer(words: list[str] | None = None, length: int = 1024) -> PreTrainedTokenizerFast:
    """WordPiece over the lab's words; any other word of letters and digits falls apart into characters."""
    words = words or vocabulary()
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=length,
    )


def spell(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of a string that is read, character by character."""
    pieces = [text[0], *(f"##{c}" for c in text[1:])]
    return tokenizer.convert_tokens_to_ids(pieces)


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None, template: str = CHAT_TEMPLATE) -> LlavaProcessor:
    """Pads nothing and crops nothing: the whole picture is resized to a square, so patch (r, c) is easy to find."""
    images = CLIPImageProcessor(
        do_resize=True,
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )


def build_model(vision: LabVisionConfig, width: int = 160, layers: int = 5) -> LlavaForConditionalGeneration:
    """An untrained lab VLM in float32: the tower, a linear projector and a small Llama."""
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=432,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="linear",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


@torch.no_grad()
def start_aligned(
    model: LlavaForConditionalGeneration, heads: dict[str, torch.Tensor], names: dict[str, tuple]
) -> None:
    """Start the language model where the tower already is (docs/lab.md).

    heads: classifier weights [classes, d] of the tower's tag heads; names: their class names. Word embeddings (tied
    with the output) start from the tower's own prototypes of what they name, the projector starts as the identity,
    and three of five attention heads a layer start "mimetic": query = key, output = transposed value, so that equal
    content attends to equal content from the first step (Trockman and Kolter, arXiv 2305.09828).
    """
    generator = torch.Generator().manual_seed(0)
    table = model.get_input_embeddings().weight
    table.normal_(std=0.25, generator=generator)
    tokens = {w: i for i, w in enumerate(vocabulary())}
    for head in ("link", "cls", "colour", "state"):  # later ones win where a word is in several
        weight = heads[head] - heads[head][1:].mean(0)
        for row, name in enumerate(names[head]):
            word = name.split(":")[-1]
            for token in (word, f"##{word}"):
                if word and token in tokens:
                    noise = torch.randn(weight.shape[1], generator=generator) * 0.05
                    table[tokens[token]] = 0.25 * weight[row] / weight[row].std() + noise
    for words, head in ((("left", "right"), "column"), (("top", "bottom"), "row")):
        weight, half = heads[head], heads[head].shape[0] // 2
        side = weight[:half].mean(0) - weight[half:].mean(0)
        for word, sign in zip(words, (1, -1), strict=True):
            table[tokens[word]] = sign * 0.25 * side / side.std()
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.copy_(torch.eye(linear.weight.shape[0]))
        linear.bias.zero_()
    text = model.model.language_model
    width, head_dim = text.config.hidden_size, text.config.hidden_size // text.config.num_attention_heads
    for layer in text.layers:
        attention = layer.self_attn
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            module.weight.normal_(std=0.5 * width**-0.5, generator=generator)
        same = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        copy = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        mimetic = slice(0, 3 * head_dim)
        attention.q_proj.weight[mimetic] = 0.8 * same[mimetic]
        attention.k_proj.weight[mimetic] = 0.8 * same[mimetic]
        attention.v_proj.weight[mimetic] = 0.7 * copy[mimetic]
        attention.o_proj.weight[:, mimetic] = 0.7 * copy[mimetic].T
        layer.mlp.down_proj.weight.normal_(std=0.3 * width**-0.5, generator=generator)
        layer.mlp.gate_proj.weight.normal_(std=width**-0.5, generator=generator)
        layer.mlp.up_proj.weight.normal_(std=width**-0.5, generator=generator)
