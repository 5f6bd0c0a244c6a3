"""Advantage-weighted matching: the loss of pretraining, on samples weighted by how good they are."""

from torch import Tensor

from .clipped import surrogate
from .draws import Draws
from .steps import per_value

POWER, LEAST = 0.25, 1e-10  # as published


def awm(draws: Draws, low: float, high: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), rho = exp(l_old - l), l the loss of flow matching (arXiv 2509.25050): it stands for -log p of the sample.

    l is as in the settings that were published with the code, t / p (mean (v - (eps - x0))^2)^p with p = 0.25, so that no outlier decides; t is the part of
    noise. Of a diffusion the same is taken of epsilon. The published clip range, 1, clips hardly anything. The pull to a slowly following policy that the
    code has besides is left out, and its division of advantages by 5.
    """
    rho = (_loss(draws, draws.old) - _loss(draws, draws.output)).exp()
    loss, outside = surrogate(rho, draws.advantages, low, high)
    return loss, rho, outside


def _loss(draws: Draws, output: Tensor) -> Tensor:
    return draws.noise * (per_value((output - draws.target) ** 2) + LEAST) ** POWER / POWER
