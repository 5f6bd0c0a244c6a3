"""DiffusionNFT: what is better than the policy is that way from it, and what is worse the other."""

import torch
from torch import Tensor

from .draws import Draws
from .steps import per_value

MOST, LEAST = 5.0, 1e-5  # as published: advantages from -5 to 5 are r from 0 to 1; and no error is divided by less than this


def diffusion_nft(draws: Draws, low: float, high: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """r |v+ - v|^2 + (1 - r) |v- - v|^2, v+- = v_old +- beta (v_theta - v_old), v = eps - x0, r = 1/2 + A / 10 in 0..1 (arXiv 2509.16117).

    As in the published code each square is of the x0 that follows from the velocity, divided by its mean absolute error, and the whole is times 5 / beta;
    so written it is the same of epsilon. Nothing is clipped. At the first optimizer step beta does not matter; at later ones it pulls back to v_old, the
    more the larger it is. v_old is the policy that sampled: the published code lets it follow more slowly, which is left out here.
    """
    r = 0.5 + (draws.advantages / (2 * MOST)).clamp(-0.5, 0.5)
    positive = _error(draws, (1 - beta) * draws.old + beta * draws.output)
    negative = _error(draws, (1 + beta) * draws.old - beta * draws.output)
    ones = torch.ones_like(r)
    return MOST / beta * (r * positive + (1 - r) * negative), ones, torch.zeros_like(r, dtype=torch.bool)


def _error(draws: Draws, output: Tensor) -> Tensor:
    """[B]: the mean square of the error of x0, by its mean size."""
    error = draws.error.view(-1, *[1] * (output.ndim - 1)) * (output - draws.target)
    return per_value(error**2) / per_value(error.detach().abs()).clamp(min=LEAST)
