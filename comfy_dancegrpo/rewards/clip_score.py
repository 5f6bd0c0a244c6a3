"""CLIP score: how well a picture fits its prompt.

The cosine of CLIP's picture and text embeddings (arXiv 2104.08718, without its factor of 2.5 and its clipping), in -1..1. Takes
a transformers `CLIPModel` folder. The embedded one is GPL-3.0-or-later; OpenAI's weights are MIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast

from ..pixels import to_bytes
from .base import Source

try:  # without torchvision, newer transformers has the Pillow processor under this name; older ones had no other
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor


class ClipScore(torch.nn.Module):
    def __init__(self, folder: Path):
        super().__init__()
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
        self.tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def forward(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        device, length = self.model.device, self.model.config.text_config.max_position_embeddings
        # as a saved picture would score: the Pillow processor resizes in 8 bits, and would cut floats down to them
        rounded = [to_bytes(p) for p in pictures]
        pixels = self.processor(rounded, return_tensors="pt", input_data_format="channels_last")
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        output = self.model(input_ids=tokens.input_ids.to(device), pixel_values=pixels.pixel_values.to(device))
        return (output.image_embeds * output.text_embeds).sum(-1)


def load(source: Source) -> ClipScore:
    return ClipScore(source.model).requires_grad_(False).eval()
