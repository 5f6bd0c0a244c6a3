"""Coefficients-preserving sampling for rectified flows: after each step x holds as much noise as its sigma says, and no more."""

import math

import torch
from torch import Tensor

from ..gaussian import Gaussian


def cps(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float | Tensor) -> Gaussian:
    """A part of the predicted noise is replaced by fresh noise (arXiv 2509.05952), all of it at eta 1 and above.

    mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1;  std = sigma_next sin(eta pi / 2);  x0 = x - sigma v, x1 = x + (1 - sigma) v.
    """
    x0, x1 = x - sigma * velocity, x + (1 - sigma) * velocity
    angle = torch.as_tensor(eta, dtype=sigma_next.dtype, device=sigma_next.device).clamp(max=1) * (math.pi / 2)
    # sqrt(sigma_next^2 - std^2) is sigma_next cos(angle), and rounds to no negative number under a root
    return Gaussian(mean=(1 - sigma_next) * x0 + sigma_next * angle.cos() * x1, std=sigma_next * angle.sin(), x0=x0)
