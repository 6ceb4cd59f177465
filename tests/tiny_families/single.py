"""Families whose items are square images or tiles of a fixed number of rows, in one tensor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel, TimmWrapperConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tiny_families.base import END, IMAGE, START, TEXT, VIDEO, VISION, VOCABULARY, Picture, Tiny, noise
from tiny_families.plain import CLIP, LLAMA, squares

SIGLIP = VISION | {"model_type": "siglip_vision_model", "patch_size": 4, "vision_use_head": False}
COHERE = TEXT | {"model_type": "cohere2", "sliding_window": 256}


class TinyTimm(PreTrainedModel):
    """In place of timm's towers, which transformers only wraps: timm is not installed with it.

    Two convolutions: [b, 3, H, W] to [b, d, h, w], or to [b, 1 + n, d] with a CLS row where `embed_dim` says d.
    """

    config_class = TimmWrapperConfig
    main_input_name = "pixel_values"
    input_modalities: ClassVar = ("image",)
    _supports_sdpa = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.flat = bool(config.model_args and "embed_dim" in config.model_args)
        width = config.model_args["embed_dim"] if self.flat else config.hidden_size
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden = self.mix(self.patches(pixel_values).tanh())
        if self.flat:
            rows = hidden.flatten(2).transpose(1, 2)
            hidden = torch.cat((rows.mean(1, keepdim=True), rows), dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden)


class TinyMobileNet(TinyTimm):
    """The same for Gemma 3n, whose vision config is a class of its own."""

    config_class = Gemma3nVisionConfig


AutoModel.register(TimmWrapperConfig, TinyTimm, exist_ok=True)
AutoModel.register(Gemma3nVisionConfig, TinyMobileNet, exist_ok=True)


def one_by_one(generator: torch.Generator) -> Picture:
    """A picture of one tile in a dimension of its own, as PerceptionLM's processor returns it."""
    return Picture([IMAGE] * 16, [16], {"pixel_values": noise(generator, 1, 1, 3, 64, 64)})


def shrunk_audio(width: int) -> dict[str, Any]:
    """Gemma 3n is built with its audio tower, which nothing here runs."""
    return {
        "vocab_size": 1,
        "vocab_offset": VOCABULARY,
        "hidden_size": width,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": [4, 2],
    }


SINGLE = [
    Tiny(
        "aya_vision",
        {"vision_config": SIGLIP, "text_config": COHERE, "image_token_index": IMAGE},
        squares(16),
    ),
    Tiny(
        "cohere2_vision",
        {
            "vision_config": SIGLIP,
            "text_config": COHERE,
            "image_token_id": IMAGE,
            "alignment_intermediate_size": 64,
        },
        squares(16),
    ),
    Tiny(
        "fast_vlm",
        {
            "vision_config": {"model_type": "timm_wrapper", "hidden_size": 32},
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_index": IMAGE,
        },
        squares(16),
    ),
    Tiny(
        "gemma3n",
        {
            "vision_config": {"hidden_size": 32, "vocab_size": 1, "vocab_offset": IMAGE},
            "text_config": TEXT
            | {
                "head_dim": 12,
                "sliding_window": 256,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "altup_num_inputs": 2,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            },
            "audio_config": shrunk_audio(16),
            "vision_soft_tokens_per_image": 16,
            "image_token_id": IMAGE,
            "audio_token_id": 96,
            "boi_token_id": START,
            "eoi_token_id": END,
        },
        squares(16, (START,), (END,)),
        embedding=0.15,
    ),
    Tiny(
        "got_ocr2",
        {
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 2,
                "window_size": 8,
                "global_attn_indexes": [1],
                "mlp_dim": 64,
            },
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_index": IMAGE,
        },
        squares(16),
    ),
    Tiny(
        "perception_lm",
        {
            "vision_config": {"model_args": {"embed_dim": 32}},
            "text_config": LLAMA,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "projector_pooling_ratio": 2,
        },
        one_by_one,
    ),
    Tiny(
        "vipllava",
        {
            "vision_config": CLIP | {"num_hidden_layers": 3},
            "text_config": LLAMA,
            "image_token_index": IMAGE,
            "vision_feature_layer": [-2, 1],
            "vision_feature_layers": [-2, 1],  # as transformers 5.19 reads it
        },
        squares(16),
    ),
]
