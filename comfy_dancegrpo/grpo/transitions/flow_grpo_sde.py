"""The SDE of Flow-GRPO for rectified flows: most noise where most is undecided."""

import torch
from torch import Tensor

from ..gaussian import Gaussian
from .dance_sde import dance_sde

ONE = 1 - 1e-5  # sigma 1, and what schedulers shave off it (UniPC 1e-6): a / (1 - sigma) would be all noise there


def flow_grpo_sde(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float | Tensor) -> Gaussian:
    """`dance_sde` with a noise level that follows sigma (arXiv 2505.05470, eq. 8 and 9): a sqrt(sigma / (1 - sigma)), a = eta.

    At sigma 1 the denominator would be 0, and takes the grid's second sigma, as the authors' code does: that is sigma_next there.
    """
    denominator = torch.where(sigma < ONE, 1 - sigma, 1 - sigma_next)
    return dance_sde(x, velocity, sigma, sigma_next, eta * (sigma / denominator).sqrt())
