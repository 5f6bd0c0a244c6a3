"""CLIP's two towers, as the rewards built on them take them: from pictures and prompts to embeddings of length 1."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast

from ..errors import RunError
from ..pixels import to_bytes
from .preprocessing import cropped

try:  # without torchvision, newer transformers has the Pillow processor under this name; older ones had no other
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

_FAULTS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)  # of transformers, about a folder


class Clip(torch.nn.Module):
    """preprocess: from pictures [H, W, 3] uint8 to pixel values [N, 3, S, S] float32. clean: what is done to a prompt before it is tokenised."""

    def __init__(self, model: CLIPModel, tokenizer, preprocess: Callable[[Sequence[np.ndarray]], Tensor], clean: Callable[[str], str] = str):
        super().__init__()
        self.model, self.tokenizer, self.preprocess, self.clean = model, tokenizer, preprocess, clean

    def pictures(self, pictures: Tensor | Sequence[Tensor]) -> Tensor:
        """N pictures [H, W, 3] in 0..1, taken as they would be saved in 8 bits, to [N, D]."""
        pixels = self.preprocess([to_bytes(picture) for picture in pictures])
        output = self.model.vision_model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return F.normalize(self.model.visual_projection(output.pooler_output), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[N, D]; prompts longer than the model takes (77 tokens) are cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([self.clean(str(prompt)) for prompt in prompts], padding="max_length", max_length=length, truncation=True,
                                return_tensors="pt")
        output = self.model.text_model(input_ids=tokens.input_ids.to(self.model.device))
        return F.normalize(self.model.text_projection(output.pooler_output), dim=-1)

    @torch.no_grad()
    def forward(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[N], the cosines."""
        return (self.pictures(pictures) * self.texts(prompts)).sum(-1)


def model(folder: Path) -> CLIPModel:
    """Of a transformers folder, in float32; safetensors first. Raises `RunError` where weights are damaged, missing or of another shape."""
    try:
        found, told = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except _FAULTS as error:
        raise _unfit(folder, error) from None
    if missing := sorted(told["missing_keys"]):
        raise RunError(f"{folder}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    return found.float()


def tokenizer(folder: Path):
    if not ((folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))):
        # transformers would make up an empty one
        raise RunError(f"{folder}: it has no tokenizer.json, and no vocab.json with merges.txt; accepted: a base that has them")
    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except _FAULTS as error:
        raise _unfit(folder, error) from None


def processor(folder: Path, of_transformers: bool = True) -> Callable[[Sequence[np.ndarray]], Tensor]:
    """The folder's own preprocessing, in Pillow: OpenAI's is bicubic to the shorter side, the middle cut out, mean and deviation taken off.

    of_transformers: with the roundings of transformers, for what was published on it; else those of OpenAI's and OpenCLIP's own code.
    """
    try:
        process = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except _FAULTS as error:
        raise _unfit(folder, error) from None
    cut = (lambda picture: picture) if of_transformers else (lambda picture: cropped(picture, process.crop_size["height"]))
    return lambda pictures: process([cut(picture) for picture in pictures], return_tensors="pt", input_data_format="channels_last").pixel_values


def clean(prompt: str) -> str:
    """As OpenAI's and OpenCLIP's own tokenizer does first: broken characters mended, HTML's entities read, white space made one blank, in
    Python's lower case (the tokenizers library knows no final sigma)."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def _unfit(folder: Path, error: Exception) -> RunError:
    return RunError(f"{folder}: transformers cannot load it as a CLIP model ({' '.join(str(error).split())[:200]})")
