"""Transitions of the denoising process: each is one Gaussian, x_next ~ N(mean, std^2).

A transition is a function `(x, output, level, level_next, eta) -> Gaussian` in a file of its own and a line here. x and output
are [B, ...]; level and level_next are broadcastable to it ([B, 1, ...]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocol import at_least_float32


@dataclass(frozen=True)
class Gaussian:
    """mean and x0 (the predicted data): [B, ...]; std: broadcastable to them, 0 where the step is deterministic."""

    mean: Tensor
    std: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Transition:
    """process: "flow" or "diffusion". scored: which field of the last step's Gaussian is decoded and scored."""

    name: str
    process: str
    scored: str
    step: Callable[[Tensor, Tensor, Tensor, Tensor, float], Gaussian]


def log_prob(x_next: Tensor, gaussian: Gaussian) -> Tensor:
    """[B] float32 (float64 for float64): log N(x_next; mean, std^2), averaged over all but the batch dimension.

    Averaged, not summed, as in DanceGRPO and DDPO (arXiv 2305.13301): the clip range then does not depend on the picture's size.
    """
    x_next, mean, std = (at_least_float32(t) for t in (x_next, gaussian.mean, gaussian.std))
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


from .dance_sde import dance_sde  # noqa: E402  (the functions above are theirs to import)
from .ddim import ddim  # noqa: E402
from .ode import ode  # noqa: E402

TRANSITIONS: dict[str, Transition] = {
    "dance_sde": Transition("dance_sde", "flow", "x0", dance_sde),
    "ode": Transition("ode", "flow", "x0", ode),
    "ddim": Transition("ddim", "diffusion", "mean", ddim),
}
