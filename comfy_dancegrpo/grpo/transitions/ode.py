"""The deterministic step of a rectified flow."""

from torch import Tensor

from ..gaussian import Gaussian


def ode(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float | Tensor = 0.0) -> Gaussian:
    """Euler's step of dx = v dsigma (arXiv 2209.03003, eq. 1); std is 0 whatever eta."""
    return Gaussian(mean=x + velocity * (sigma_next - sigma), std=sigma * 0.0, x0=x - sigma * velocity)
