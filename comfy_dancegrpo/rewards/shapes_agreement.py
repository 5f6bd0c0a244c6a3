"""The exact reward of the embedded set: the share of a caption's five attributes that the pixels show, 0, 0.2 … 1.

Measured, not learned (see `embedded/shapes.py`), so no policy can please it without drawing what was asked. GPL-3.0-or-later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..embedded import shapes
from .base import Source


def load(source: Source):
    def shapes_agreement(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([shapes.agreement(p.double().cpu().numpy(), text) for p, text in zip(pictures, prompts)])

    return shapes_agreement
