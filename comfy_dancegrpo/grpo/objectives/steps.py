"""What objectives are given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """B replayed transitions. log_prob: under the policy as it is, log_prob_old: as it was when they were sampled, averaged over a latent's values;
    advantages: each [B]. mean: of the policy's Gaussian as it is, [B, ...]; mean_old: as it was, where the objective needs it; std: of both,
    broadcastable to them. duration: [B], by how much the level changes. Gradients are of log_prob and mean.
    """

    log_prob: Tensor
    log_prob_old: Tensor
    advantages: Tensor
    mean: Tensor
    std: Tensor
    duration: Tensor
    mean_old: Tensor | None = None


def ratio(steps: Steps) -> Tensor:
    """[B]: rho = exp(log_prob - log_prob_old)."""
    return (steps.log_prob - steps.log_prob_old).exp()


def per_value(tensor: Tensor) -> Tensor:
    """[B]: the mean over all but the batch dimension, as log-probabilities have it."""
    return tensor.flatten(1).mean(1)
