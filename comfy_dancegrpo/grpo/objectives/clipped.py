"""The clipped surrogate of PPO, as GRPO takes it."""

import torch
from torch import Tensor

from .steps import Steps, ratio


def clipped(steps: Steps, low: float, high: float) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), rho = exp(log p - log p_old) (arXiv 1707.06347, eq. 7; arXiv 2505.07818, eq. 8).

    high above low is DAPO's clip-higher (arXiv 2503.14476): what was unlikely may become likelier by more than what was likely less likely.
    """
    return surrogate(ratio(steps), steps.advantages, low, high)


def surrogate(rho: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The losses [B] by ratios and advantages [B], and where the ratio is out of its range."""
    loss = torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - low, 1 + high))
    return loss, (rho < 1 - low) | (rho > 1 + high)
