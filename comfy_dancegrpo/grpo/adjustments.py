"""What may be done to a reward's scores before they become advantages: one equation each, on [N] float32, giving the same.

Imports no torch: a node asks `bounds_problem` before anything is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .groups import members

if TYPE_CHECKING:
    from torch import Tensor


def threshold(values: Tensor, least: float) -> Tensor:
    """The binary reward of arXiv 2505.07818, section 2.3: 1 where a score is above `least`, 0 elsewhere (also where it equals it)."""
    return (values > least).to(values.dtype)


def clip(values: Tensor, low: float, high: float) -> Tensor:
    """min(max(r, low), high), as rewards are clipped since arXiv 1312.5602, section 5.

    Raises:
        ValueError: low is not below high.
    """
    if problem := bounds_problem(low, high):
        raise ValueError(problem)
    return values.clamp(low, high)


def bounds_problem(low: float, high: float) -> str | None:
    """Why `clip` would raise, in one line; None when it would not."""
    return None if low < high else f'input "high": found {high:g}, accepted: above "low" ({low:g})'


def rank(values: Tensor, groups: Tensor) -> Tensor:
    """The share of the rest of its group that a score is above; ties share the mean of their ranks (Kendall, Biometrika 33, 1945).

    (rank - 1) / (G - 1) with ranks from 1: 0 for the group's least score, 1 for its largest, 0.5 for all of a group that ties.

    Args:
        values: [N] scores. groups: [N] int64 in 0..P-1, each group with at least two members.
    """
    ranks = values.new_empty(len(values))
    for rows in members(groups):
        member = values[rows]
        below = (member[:, None] > member).sum(1)
        ties = (member[:, None] == member).sum(1) - 1  # with others than itself
        ranks[rows] = (below + ties / 2).to(values.dtype) / (len(rows) - 1)
    return ranks
