"""How samples go on by the ODE once their group has no noise any more. Importing this imports no torch.

With x = alpha x0 + sigma x1 and lambda = log(alpha / sigma), a transition without noise is the solution for an x0 that stays what the denoiser says:
x_next = sigma_next / sigma x + (alpha_next - alpha sigma_next / sigma) x0. That is of order 1: Euler's step of a flow, DDIM's of a diffusion model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EULER, DPM_PP_2M = ODE_SOLVERS = ("euler", "dpm++ 2m")


def second_order(levels: Tensor, process: str) -> Tensor:
    """[T] float64 on the CPU: what makes a step one of order 2, as the weight of x0 less that of the step before: multistep DPM-Solver++
    (arXiv 2211.01095, algorithm 2), which takes x0 to move on as it did over that step, evenly in lambda.

    (alpha_next - alpha sigma_next / sigma) h / (2 h_before), with h = lambda_next - lambda; 0 at the first step, after one from pure noise, and to sigma 0,
    where h is infinite.

    Args:
        levels: [T + 1], of `TimeGrid`. process: "flow" or "diffusion".
    """
    levels = levels.cpu().double()
    alpha, sigma = (1 - levels, levels) if process == "flow" else (levels.sqrt(), (1 - levels).sqrt())
    h = (alpha.log() - sigma.log()).diff()
    weights = (alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]) * h / (2 * h.roll(1))
    weights[0] = 0
    return weights.nan_to_num(0.0, 0.0, 0.0)
