"""What an objective may have added to it."""

from torch import Tensor

from .steps import Steps, per_value


def kl(steps: Steps, reference: Tensor) -> Tensor:
    """[B]: KL(policy || reference) of each transition, exactly: two Gaussians of one std, |mean - reference|^2 / (2 std^2) (as in Flow-GRPO, arXiv 2505.05470).

    reference: the other's mean [B, ...]. Averaged over a latent's values, as log-probabilities are. Its gradient goes through the policy's mean.
    """
    return per_value((steps.mean - reference) ** 2 / (2 * steps.std**2))
