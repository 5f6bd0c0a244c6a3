"""The groups of a rollout's samples, the ways in which several rewards are combined in them, and what a sample is compared with (`estimators`).

Imports no torch: nodes name them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NORMALISE_FIRST, SUM_FIRST = COMBINATIONS = ("normalise each, then sum", "sum, then normalise")
GROUP, BATCH_STD, PER_PROMPT, BATCH, RANK, LEAVE_ONE_OUT, LEARNED_VALUE = ESTIMATORS = (
    "group", "group mean, batch std", "per-prompt history", "batch", "rank", "leave-one-out", "learned value")


def members(groups: Tensor) -> Iterator[Tensor]:
    """The rows [G] int64 of each group of `groups` [N] int64 in 0..P-1, ascending; groups may differ in size and lie in any order.

    Raises:
        ValueError: a group has fewer than two members, so there is nothing that they could be compared with.
    """
    for g in range(int(groups.max()) + 1):
        rows = (groups == g).nonzero()[:, 0]
        if len(rows) < 2:
            raise ValueError(f"group {g} has {len(rows)} samples, accepted: at least 2")
        yield rows
