"""How the published rewards cut and normalise pictures, in one place."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def cropped(picture: np.ndarray, side: int) -> np.ndarray:
    """[H, W, 3] uint8 to [side, side, 3]: the shorter side resized to `side` by Pillow's bicubic filter, the middle square.

    As the code of OpenAI's CLIP, OpenCLIP and ImageReward has it: with the roundings of torchvision's Resize and CenterCrop, which differ by a
    pixel from those of transformers' processors.
    """
    image = Image.fromarray(picture)
    width, height = (int(side * length / min(image.size)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side)))


def normalised(pixels: Tensor) -> Tensor:
    """[..., 3, H, W] in 0..1, by the mean and the deviation of OpenAI's CLIP."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std
