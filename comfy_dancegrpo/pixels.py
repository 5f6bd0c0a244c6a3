"""Pictures in 8 bits, as they are saved and as rewards see them."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def to_bytes(pictures: Tensor) -> np.ndarray:
    """Of any shape in 0..1 to 8 bits, rounded; what lies outside is clipped."""
    return (pictures.cpu().float().numpy() * 255).round().clip(0, 255).astype(np.uint8)
