"""The Gaussian that every transition is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocol import at_least_float32


@dataclass(frozen=True)
class Gaussian:
    """mean and x0 (the predicted data): [B, ...]; std: broadcastable to them, 0 where the step is deterministic."""

    mean: Tensor
    std: Tensor
    x0: Tensor


def log_prob(x_next: Tensor, gaussian: Gaussian) -> Tensor:
    """[B] float32 (float64 for float64): log N(x_next; mean, std^2), averaged over all but the batch dimension.

    Averaged, not summed, as in DanceGRPO and DDPO (arXiv 2305.13301): the clip range then does not depend on the picture's size.
    """
    x_next, mean, std = (at_least_float32(t) for t in (x_next, gaussian.mean, gaussian.std))
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
