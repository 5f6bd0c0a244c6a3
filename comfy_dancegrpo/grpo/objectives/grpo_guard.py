"""GRPO-Guard: the clipped surrogate of a ratio that means the same at every step."""

from torch import Tensor

from .clipped import surrogate
from .steps import Steps, per_value


def grpo_guard(steps: Steps, low: float, high: float) -> tuple[Tensor, Tensor]:
    """`clipped` of the normalised ratio, divided by the step's duration, so that no noise level has most of the gradient (arXiv 2510.22319).

    rho = exp(std (log p - log p_old + b)), b = |mean - mean_old|^2 / (2 std^2), averaged over the values as log p is: b takes out that a policy which
    has moved at all finds its own samples less likely, and std that steps with little noise have the widest ratios. It is exp of the mean of
    (mean - mean_old) times the noise that was drawn. As in the published code, both means are of the transition, and a clip range wants to be small.
    """
    std = per_value(steps.std)
    bias = per_value((steps.mean - steps.mean_old) ** 2) / (2 * std**2)
    loss, outside = surrogate(((steps.log_prob - steps.log_prob_old + bias) * std).exp(), steps.advantages, low, high)
    return loss / steps.duration, outside
