"""HPS v2 (Human Preference Score, arXiv 2306.09341): which of a prompt's pictures people prefer, by 798k choices; meant is its version 2.1.

The cosine of the picture and text embeddings of an OpenCLIP ViT-H-14 tuned on them, in -1..1, for good pictures about 0.25 to 0.35 (papers
print a hundred times that). It is computed in float32; the published code computes in half precision, so its last digits differ. Takes
HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt, for version 2.0) of huggingface.co/xswu/HPSv2, an OpenCLIP checkpoint under "state_dict",
and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K the configuration and the tokenizer. Code and weights are Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import clip, open_clip
from .base import Source
from .preprocessing import normalised


def load(source: Source) -> clip.Clip:
    model = open_clip.load(source.model, source.base)
    size = model.config.vision_config.image_size
    return clip.Clip(model, clip.tokenizer(source.base), lambda pictures: preprocessed(pictures, size), clip.clean)


def preprocessed(pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """[H, W, 3] uint8 each, to [N, 3, size, size] float32: the whole picture, its longer side of that size, in the middle of black.

    As the published code does, whose transform has torchvision resize tensors (bicubic, antialiased, not clipped), and not CLIP's usual crop.
    """
    squares = []
    for picture in pictures:
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        scale = size / max(pixels.shape[1:])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
        if scale != 1:
            pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
        above, left = (size - height) // 2, (size - width) // 2
        squares.append(F.pad(pixels, (left, size - width - left, above, size - height - above)))
    return normalised(torch.stack(squares))
