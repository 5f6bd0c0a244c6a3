"""Scores to group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import NORMALISE_FIRST, SUM_FIRST, members
from .protocol import Advantages, Scores


def group_advantages(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises within groups (arXiv 2402.03300, section 4.1.2): (r - mean) / (std + 1e-8), unbiased std.

    Args:
        values: [N] scores. groups: [N] int64 in 0..P-1, each group with at least two members.

    Returns:
        advantages [N], 0 in flat groups; flat [P] bool, where std <= 1e-6 (1 + |mean|); std [P] float64.

    Raises:
        ValueError: a score is NaN or infinite (it would make its whole group so), or a group has one member.
    """
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"the score of sample {bad} is {values[bad].item()}, accepted: finite numbers")
    advantages, flat, stds = torch.zeros_like(values), [], []
    for rows in members(groups):
        member = values[rows].double()  # in float32 the mean of scores near 1000 is off by 1e-4 of a spread of 0.5
        mean, std = member.mean(), member.std()
        flat.append(std <= 1e-6 * (1 + mean.abs()))
        stds.append(std)
        if not flat[-1]:
            advantages[rows] = ((member - mean) / (std + 1e-8)).to(values.dtype)
    return advantages, torch.stack(flat), torch.stack(stds)


def best_and_worst(values: Tensor, groups: Tensor, indices: Tensor, count: int) -> Tensor:
    """[N] bool: the count / 2 largest and the count / 2 smallest values of each group (Best-of-N, arXiv 2505.07818, section 3.2).

    Among equal values a later place in the group (`indices` [N] int64) counts as larger, so the order of the rows does not matter.

    Raises:
        ValueError: count is odd, below 2, or more than the members of a group.
    """
    chosen, parts = torch.zeros(len(values), dtype=torch.bool), list(members(groups))
    smallest = min(map(len, parts))
    if count < 2 or count % 2 or count > smallest:
        raise ValueError(f'input "best_of": found {count}, accepted: 0 (all), or an even number up to the {smallest} of a group')
    for rows in parts:
        ascending = torch.tensor(sorted(rows.tolist(), key=lambda row: (values[row].item(), indices[row].item())))
        chosen[ascending[:count // 2]] = chosen[ascending[len(rows) - count // 2:]] = True
    return chosen


def combine(scores: Scores, clamp: float = 5.0, combination: str = NORMALISE_FIRST, best_of: int = 0) -> Advantages:
    """The advantages of a rollout by all its rewards, clamped to +-clamp.

    NORMALISE_FIRST: sum_k w_k A(r_k), each reward normalised in its group (arXiv 2505.07818, algorithm 1); a group is flat when it is
    for every reward of non-zero weight. SUM_FIRST: A(sum_k w_k r_k), so that units count; a group is flat when its sums are.

    best_of: 0, or how many of each group are trained, the best and the worst by the advantage before it is clamped (as the
    published code's `--bestofn`); all of the group are compared with. Flat groups train nothing either way.

    Raises:
        ValueError: `best_of` does not fit the groups, a score is not finite, or a group has one member.
    """
    groups, columns = scores.rollout.groups.cpu(), [(column.weight, column.used.cpu()) for column in scores.columns]
    if combination == SUM_FIRST:
        total, flat, _ = group_advantages(sum(weight * values.double() for weight, values in columns), groups)
        total = total.float()
    else:
        total, flat = torch.zeros(len(groups)), torch.ones(int(groups.max()) + 1, dtype=torch.bool)
        for weight, values in columns:
            advantages, flat_here, _ = group_advantages(values, groups)
            total = total + weight * advantages
            flat = flat & (flat_here | (weight == 0))
    trained = ~flat[groups]
    if best_of:
        trained = trained & best_and_worst(total, groups, scores.rollout.indices.cpu(), best_of)
    return Advantages(scores, total.clamp(-clamp, clamp), flat, trained)
