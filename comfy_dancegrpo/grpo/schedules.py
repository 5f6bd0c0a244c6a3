"""Time grids."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """[steps + 1] float64: linspace(1, 0) under s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23)."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)
