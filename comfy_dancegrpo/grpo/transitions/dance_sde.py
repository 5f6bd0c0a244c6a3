"""The SDE of DanceGRPO for rectified flows."""

from torch import Tensor

from ..gaussian import Gaussian


def dance_sde(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float | Tensor) -> Gaussian:
    """One Euler-Maruyama step of the reverse SDE that keeps the flow's marginals (arXiv 2505.07818, eq. 6 and 7).

    score = -(x - (1 - sigma) x0) / sigma^2;  mean = x + v d - eta^2 score d / 2;  std = eta sqrt(-d);  d = sigma_next - sigma.
    """
    d = sigma_next - sigma
    x0 = x - sigma * velocity
    score = -(x - (1 - sigma) * x0) / sigma**2
    return Gaussian(mean=x + velocity * d - 0.5 * eta**2 * score * d, std=eta * (-d).sqrt(), x0=x0)
