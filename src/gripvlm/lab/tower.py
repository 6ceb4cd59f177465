"""The lab's vision tower: CLIP's encoder behind a small convolutional stem.

A plain patch-embedding ViT is measurably too slow to train on two cores (docs/lab.md), so the patches come from
strided 3 x 3 convolutions with residual blocks between them. Everything after them is transformers' own CLIP
encoder, with a CLS token and attention reachable as `encoder.layers[i].self_attn`, so whatever works on CLIP's
tower works here.

Importing this module registers the tower with AutoConfig and AutoModel.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoder


class LabVisionConfig(CLIPVisionConfig):
    """CLIPVisionConfig plus the stem.

    stem_channels: widths of the strided convolutions but the last, whose width is `hidden_size`.
    stem_blocks: residual blocks after each strided convolution.
    """

    model_type = "gripvlm_lab_vision"
    base_config_key = "vision_config"

    stem_channels: list[int] | tuple[int, ...] = (32, 64)
    stem_blocks: list[int] | tuple[int, ...] = (0, 2, 2)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), [b, c, h, w] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(nn.functional.relu(self.norm1(x)))
        return x + self.conv2(nn.functional.relu(self.norm2(y)))


class LabVisionEmbeddings(nn.Module):
    """Pixels [b, 3, H, W] to CLS + patch embeddings [b, 1 + n, d] with learned positions."""

    def __init__(self, config: LabVisionConfig):
        super().__init__()
        widths = [config.num_channels, *config.stem_channels, config.hidden_size]
        if config.patch_size != 2 ** (len(widths) - 1):
            raise ValueError(
                f"{len(widths) - 1} convolutions of stride 2 make patches of {2 ** (len(widths) - 1)} pixels"
            )
        # No activation before the first convolution, nor after the last: patches go straight to the encoder.
        layers: list[nn.Module] = []
        for a, b, blocks in zip(widths[:-1], widths[1:], config.stem_blocks, strict=True):
            layers += [nn.ReLU()] if layers else []
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), *(ResidualBlock(b) for _ in range(blocks))]
        self.stem = nn.Sequential(*layers)
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1 + patches, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        maps = self.stem(pixel_values)
        patches = maps.flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        positions = self._positions(maps.shape[-2:]) if interpolate_pos_encoding else self.position_embedding
        return torch.cat([cls, patches], dim=1) + positions

    def _positions(self, raster: torch.Size) -> torch.Tensor:
        """[1 + h w, d] positions for a raster of h x w patches, bicubic as in CLIP's tower."""
        side = math.isqrt(self.position_embedding.shape[0] - 1)
        maps = self.position_embedding[1:].T.unflatten(1, (side, side))
        resized = nn.functional.interpolate(maps[None], size=tuple(raster), mode="bicubic", align_corners=False)
        return torch.cat([self.position_embedding[:1], resized[0].flatten(1).T])


class LabVisionModel(PreTrainedModel):
    """Returns `hidden_states` like CLIP's tower; the last one is after the final LayerNorm."""

    config_class = LabVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules: ClassVar[list[str]] = ["CLIPEncoderLayer"]

    def __init__(self, config: LabVisionConfig):
        super().__init__(config)
        self.embeddings = LabVisionEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LabVisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=0.02)
            nn.init.normal_(module.position_embedding, std=0.1)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        pixels = pixel_values.to(self.embeddings.position_embedding.dtype)
        hidden = self.embeddings(pixels, interpolate_pos_encoding)
        # As CLIP's tower gives them: embeddings first, then a state a layer. The projector reads the last, normalised.
        states = [hidden]
        for layer in self.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        states[-1] = self.post_layernorm(hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1], pooler_output=states[-1][:, 0], hidden_states=tuple(states)
        )


AutoConfig.register(LabVisionConfig.model_type, LabVisionConfig, exist_ok=True)
AutoModel.register(LabVisionConfig, LabVisionModel, exist_ok=True)
