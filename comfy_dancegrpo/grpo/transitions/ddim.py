"""DDIM with noise, for diffusion models."""

from torch import Tensor

from ..gaussian import Gaussian


def ddim(x: Tensor, epsilon: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float | Tensor) -> Gaussian:
    """The generalised step of DDIM (arXiv 2010.02502, eq. 12 and 16); eta 1 is DDPM's ancestral step.

    alpha_bar: cumulative product at the present timestep; alpha_bar_next: at the next, less noisy one ("prev" in the paper).
    """
    x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    std = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    mean = alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * epsilon
    return Gaussian(mean=mean, std=std, x0=x0)
