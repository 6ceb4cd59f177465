"""CLIP's text tower, for VLMs with CLIP's vision tower: the similarity of each patch to the question.

A VLM does not contain the text tower of its CLIP; load it as a `transformers.CLIPModel` of the same checkpoint.

    clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336")
    text = ClipText(clip, CLIPTokenizer.from_pretrained(...), ["What is on the table?"])
    with gripvlm.prune(model, CDPruner(clip=text), keep=64):
        model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel


class ClipText:
    """The questions of a batch as CLIP's text tower embeds them, to compare patches with.

    A question longer than the tower's context (77 tokens for CLIP) is cut into pieces of context - 2 tokens, each
    between the begin and end tokens; a patch's cosine is the mean over pieces.

    Args:
        clip: a `transformers.CLIPModel` with the vision tower of the VLM.
        tokenizer: CLIP's, or anything that makes {"input_ids": [...]} of a text and has bos_token_id and
            eos_token_id.
        questions: one text for each prompt of the batch, or one for all.

    Raises:
        InputError: not a CLIPModel, or an empty question.
    """

    def __init__(self, clip: CLIPModel, tokenizer: Any, questions: Sequence[str] | str) -> None:
        for part in ("get_text_features", "visual_projection", "vision_model", "text_model"):
            if not hasattr(clip, part):
                raise InputError(
                    f"a {type(clip).__name__} has no {part}: pass a transformers.CLIPModel, with both of its towers, "
                    "of the checkpoint that the model's vision tower came from"
                )
        self.clip = clip
        self.shared = isinstance(questions, str)
        texts = [questions] if isinstance(questions, str) else list(questions)
        with torch.no_grad():
            self.texts = [self._embed(tokenizer, text) for text in texts]  # [pieces, p] each, of length 1

    def _embed(self, tokenizer: Any, text: str) -> Tensor:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise InputError(f"question {text!r} has no tokens: pass the question that the prompt asks")
        # Two places of the context are for the begin and the end token.
        room = self.clip.config.text_config.max_position_embeddings - 2
        device = self.clip.visual_projection.weight.device
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        rows = [
            self.clip.get_text_features(
                input_ids=torch.tensor([[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]], device=device)
            ).pooler_output[0]
            for piece in pieces
        ]
        return normalize(torch.stack(rows).float(), dim=-1)

    def check(self, model: PreTrainedModel) -> None:
        """Raises an UnsupportedModelError where `clip` does not go with the model's vision tower."""
        own, model_has = self.clip.config.vision_config, getattr(model.config, "vision_config", None)
        for name in ("hidden_size", "num_hidden_layers", "patch_size"):
            if getattr(model_has, name, None) != getattr(own, name):
                raise UnsupportedModelError(
                    f"this CLIP's vision tower has {name}={getattr(own, name)}, the model's has "
                    f"{name}={getattr(model_has, name, None)}: pass the CLIPModel that the model's vision tower came "
                    "from, or leave clip out"
                )

    @torch.no_grad()
    def cosine(self, patches: Tensor, sample: int) -> Tensor:
        """[n] float32 mean cosine of patches with the question of prompt `sample`.

        Args:
            patches: [n, d_v] hidden states of the vision tower, brought to CLIP's space by its final LayerNorm and
                visual projection, as its CLS token would be.
            sample: the prompt's position in the batch.

        Raises:
            InputError: no question for this prompt.
        """
        if not self.shared and sample >= len(self.texts):
            raise InputError(f"no question for prompt {sample}: ClipText got {len(self.texts)}, one for each prompt")
        text = self.texts[0 if self.shared else sample]
        # CLIP normalises and projects its CLS token only; patches are brought to the same space by the same two layers.
        norm, projection = self.clip.vision_model.post_layernorm, self.clip.visual_projection
        rows = projection(norm(patches.to(projection.weight.device, projection.weight.dtype))).float()
        return (normalize(rows, dim=-1) @ text.T).mean(dim=1).to(patches.device)
