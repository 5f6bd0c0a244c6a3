"""Scores to group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import Advantages, Scores


def group_advantages(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises within groups (arXiv 2402.03300, section 4.1.2): (r - mean) / (std + 1e-8), unbiased std.

    Args:
        values: [N] scores. groups: [N] int64 in 0..P-1, each group with at least two members.

    Returns:
        advantages [N], 0 in flat groups; flat [P] bool, where std <= 1e-6 (1 + |mean|); std [P] float64.
    """
    advantages = torch.zeros_like(values)
    count = int(groups.max()) + 1
    flat, stds = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64)
    for g in range(count):
        rows = groups == g
        member = values[rows].double()  # in float32 the mean of scores near 1000 is off by 1e-4 of a spread of 0.5
        mean, stds[g] = member.mean(), member.std()
        flat[g] = stds[g] <= 1e-6 * (1 + mean.abs())
        if not flat[g]:
            advantages[rows] = ((member - mean) / (stds[g] + 1e-8)).to(values.dtype)
    return advantages, flat, stds


def combine(scores: Scores, clamp: float = 5.0) -> Advantages:
    """Each reward is normalised in its group first, then weighted and summed, then clamped to +-clamp (arXiv 2505.07818, 3.2).

    A group is flat when it is flat for every reward of non-zero weight.
    """
    groups = scores.rollout.groups.cpu()
    total, flat, first_std = torch.zeros(scores.rollout.size), None, None
    for _, weight, values in scores.columns:
        advantages, flat_here, stds = group_advantages(values.cpu(), groups)
        total = total + weight * advantages
        flat_here = flat_here | (weight == 0)
        flat = flat_here if flat is None else flat & flat_here
        first_std = stds.mean().item() if first_std is None else first_std
    return Advantages(scores, total.clamp(-clamp, clamp), flat, first_std)
