"""Pictures in 8 bits, as they are saved and as rewards see them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor

MOST_PIXELS = 2**26  # of a picture, or of all frames of a video, that came from elsewhere


def png(image: Image.Image) -> bytes:
    """A PNG file; little compressed, for it is made for one use."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def from_png(data: bytes) -> Image.Image:
    """The picture of a PNG file from elsewhere, RGB. Raises `ValueError`, in words, for one that is none, or of more than `MOST_PIXELS`."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"found a picture of {image.width} x {image.height}, accepted: at most {MOST_PIXELS} pixels")
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises of broken files
        raise ValueError("found what is not a PNG file, or a broken one") from None


def to_bytes(pictures: Tensor) -> np.ndarray:
    """Of any shape in 0..1 to 8 bits, rounded; what lies outside is clipped."""
    return (pictures.cpu().float().numpy() * 255).round().clip(0, 255).astype(np.uint8)
