"""What an update minimises."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(log_prob: Tensor, log_prob_old: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (arXiv 1707.06347, eq. 7; arXiv 2505.07818, eq. 8), one value a transition.

    All [B]. Returns the losses max(-A rho, -A clip(rho, 1 - c, 1 + c)) and the ratios rho = exp(log_prob - log_prob_old).
    """
    ratio = torch.exp(log_prob - log_prob_old)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return loss, ratio
