"""The plain policy gradient."""

import torch
from torch import Tensor

from .steps import Steps


def reinforce(steps: Steps, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-A log p (REINFORCE, Machine Learning 8, 1992): nothing is clipped. With KL to the reference it is DPOK's objective (arXiv 2305.16381),
    whose learned value is here the advantage's baseline."""
    return -steps.advantages * steps.log_prob, torch.zeros_like(steps.advantages, dtype=torch.bool)
