"""ImageReward: how much people would like a picture for its prompt; about -2 to 2, normalised to mean 0 and deviation 1 by its makers.

arXiv 2304.05977. Takes the published file, `ImageReward.pt` of THUDM/ImageReward: BLIP (ViT-L/16 at 224, and a BERT that attends to the
picture), whose first text token a small head turns into the score. Prompts are cut at 35 tokens. Code and weights: Apache-2.0; BLIP: BSD-3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizerFast, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ..errors import RunError
from ..pixels import to_bytes
from . import weights
from .aesthetic import Layers  # the head has their widths and names, of whose code it was made
from .base import Source
from .preprocessing import cropped, normalised

BASE = "google-bert/bert-base-uncased"
SIDE, LENGTH, HEAD = 224, 35, 64  # pixels, tokens, width of an attention head
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# from the file's names (salesforce/BLIP, which wraps timm's vision transformer) to those of transformers
VISION = ((r"^cls_token", "embeddings.class_embedding"), (r"^pos_embed", "embeddings.position_embedding"),
          (r"^patch_embed\.proj", "embeddings.patch_embedding"), (r"^norm\.", "post_layernorm."), (r"^blocks\.", "encoder.layers."),
          (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."), (r"\.norm(\d)\.", r".layer_norm\1."))
UNUSED = r"blip\.(vision_proj|text_proj|text_encoder\.embeddings\.position_ids)"  # of BLIP's pretraining, and a constant


class ImageReward(torch.nn.Module):
    def __init__(self, source: Source):
        super().__init__()
        tensors = {name: value for name, value in weights.read(source.model).items() if not re.match(UNUSED, name)}
        vision, text, head = (weights.part(tensors, prefix, source.model)
                              for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."))
        for pattern, name in VISION:
            vision = {re.sub(pattern, name, key): value for key, value in vision.items()}
        self.vision = weights.fill(lambda: BlipVisionModel(_vision_config(vision)), vision, source.model)
        self.text = weights.fill(lambda: BlipTextModel(_text_config(text, vision), add_pooling_layer=False), text, source.model)
        self.head = weights.fill(lambda: Layers(self.text.config.hidden_size), head, source.model)
        self.tokenizer = _tokenizer(source)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's own, after BERT's: a prompt that spells one has it
        if len(self.tokenizer) != self.text.config.vocab_size:  # of a folder without one transformers makes up an empty one
            raise RunError(f"{source.base}: its tokenizer has {len(self.tokenizer)} tokens with BLIP's two, accepted: {self.text.config.vocab_size}, "
                           f"of which {source.model} has embeddings, as with {BASE}")

    @torch.no_grad()
    def forward(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        device = self.vision.device
        tokens = self.tokenizer([str(prompt) for prompt in prompts], padding="max_length", truncation=True, max_length=LENGTH,
                                return_tensors="pt").to(device)
        seen = self.vision(pixel_values=preprocessed(pictures).to(device)).last_hidden_state
        text = self.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen, is_decoder=False)
        return (self.head(text.last_hidden_state[:, 0]) - MEAN) / STD


def preprocessed(pictures: Tensor | Sequence[Tensor]) -> Tensor:
    """[H, W, 3] in 0..1 each, taken in 8 bits, to [N, 3, 224, 224] float32."""
    pixels = torch.from_numpy(np.stack([cropped(to_bytes(picture), SIDE) for picture in pictures]))
    return normalised(pixels.permute(0, 3, 1, 2).float() / 255)


def _tokenizer(source: Source) -> BertTokenizerFast:
    try:
        return BertTokenizerFast.from_pretrained(source.base, local_files_only=True)
    except Exception as error:  # the tokenizers library has classes of its own, and of a damaged file any comes
        raise RunError(f"{source.base}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]}), accepted: that of {BASE}") from None


def _vision_config(tensors: dict[str, Tensor]) -> BlipVisionConfig:
    width = _rows(tensors, "post_layernorm.weight")
    return BlipVisionConfig(hidden_size=width, intermediate_size=_rows(tensors, "encoder.layers.0.mlp.fc1.weight"), image_size=SIDE, patch_size=16,
                            num_hidden_layers=_layers(tensors), num_attention_heads=max(width // HEAD, 1), layer_norm_eps=1e-6)


def _text_config(tensors: dict[str, Tensor], vision: dict[str, Tensor]) -> BlipTextConfig:
    width = _rows(tensors, "embeddings.LayerNorm.weight")
    return BlipTextConfig(vocab_size=_rows(tensors, "embeddings.word_embeddings.weight"), hidden_size=width,
                          encoder_hidden_size=_rows(vision, "post_layernorm.weight"), num_attention_heads=max(width // HEAD, 1),
                          intermediate_size=_rows(tensors, "encoder.layer.0.intermediate.dense.weight"), num_hidden_layers=_layers(tensors),
                          max_position_embeddings=_rows(tensors, "embeddings.position_embeddings.weight"))


def _layers(tensors: dict[str, Tensor]) -> int:
    return len({found[1] for name in tensors if (found := re.match(r"encoder\.layers?\.(\d+)\.", name))})


def _rows(tensors: dict[str, Tensor], name: str) -> int:
    """Where the tensor lacks any number does: that it lacks is said when the module is filled."""
    return len(tensors[name]) if name in tensors else HEAD


def load(source: Source) -> ImageReward:
    return ImageReward(source).float()
