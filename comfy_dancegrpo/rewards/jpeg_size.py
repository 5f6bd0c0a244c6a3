"""JPEG size: how many kilobytes (of 1000 bytes) a picture takes as a JPEG of quality 95; above 0: 5 for a grey 512x512, 308 for one of noise.

Measured, not learned: detail, texture and noise make it larger. It comes from DDPO (arXiv 2305.13301), whose jpeg_incompressibility is
this reward, and whose jpeg_compressibility is this reward with a weight of -1. The prompt plays no part. GPL-3.0-or-later.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..pixels import to_bytes
from .base import Source

QUALITY = 95


def load(source: Source):
    def jpeg_size(pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([_bytes(picture) / 1000 for picture in pictures])

    return jpeg_size


def _bytes(picture: Tensor) -> int:
    file = io.BytesIO()
    Image.fromarray(to_bytes(picture)).save(file, "JPEG", quality=QUALITY)
    return file.tell()
