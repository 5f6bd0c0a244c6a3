"""Scores to advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from . import estimators
from .groups import GROUP, NORMALISE_FIRST, SUM_FIRST, members
from .protocol import Advantages, Rollout, Scores


def flat_groups(values: Tensor, groups: Tensor) -> Tensor:
    """[P] bool: the groups of scores [N] without spread, std <= 1e-6 (1 + |mean|), in which there is nothing to compare. Raises `ValueError` as `members`."""
    return torch.stack([values[rows].std() <= 1e-6 * (1 + values[rows].mean().abs()) for rows in members(groups)])


def of_one_reward(values: Tensor, groups: Tensor, estimator: str = GROUP, rollout: Rollout | None = None,
                  history: estimators.History = {}) -> tuple[Tensor, Tensor, estimators.History | None]:
    """The advantages by one reward, whose flat groups have none, whatever they are compared with.

    Args:
        values: [N] scores. groups: [N] int64 in 0..P-1, each group with at least two members. estimator: one of `groups.ESTIMATORS`.
        rollout: of the scores, and history: what was remembered of former ones; for those of `estimators.REMEMBERING`.

    Returns:
        advantages [N] float64; flat [P] bool; what is remembered now, else None.

    Raises:
        ValueError: a score is NaN or infinite (it would make its whole group so), or a group has one member.
    """
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"the score of sample {bad} is {values[bad].item()}, accepted: finite numbers")
    values = values.double()  # in float32 the mean of scores near 1000 is off by 1e-4 of a spread of 0.5
    flat = flat_groups(values, groups)
    if estimator in estimators.REMEMBERING:
        found, remembered = estimators.REMEMBERING[estimator](values, rollout, history)
    else:
        found, remembered = estimators.OF_ONE_ITERATION[estimator](values, groups), None
    return found.masked_fill(flat[groups], 0.0), flat, remembered


def best_and_worst(values: Tensor, groups: Tensor, indices: Tensor, count: int) -> Tensor:
    """[N] bool: the count / 2 largest and the count / 2 smallest values of each group (Best-of-N, arXiv 2505.07818, section 3.2).

    Among equal values a later place in the group (`indices` [N] int64) counts as larger, so the order of the rows does not matter.

    Raises:
        ValueError: count is odd, below 0, or more than the members of a group.
    """
    chosen, parts = torch.zeros(len(values), dtype=torch.bool), list(members(groups))
    _check("best_of", count, min(map(len, parts)))
    for rows in parts:
        ascending = torch.tensor(sorted(rows.tolist(), key=lambda row: (values[row].item(), indices[row].item())))
        chosen[ascending[:count // 2]] = chosen[ascending[len(rows) - count // 2:]] = True
    return chosen


def best_of_now(rollout: Rollout, best_of: int, end: int) -> int:
    """How many of each group are trained in this iteration, where that moves over the run from `best_of` to `end`: the nearest even number, of two the
    larger; 0 is all of a group, and what comes near to that is all too.

    Raises:
        ValueError: one of the two is odd, below 0, or more than the members of a group.
    """
    smallest = min(map(len, members(rollout.groups.cpu())))
    _check("best_of", best_of, smallest)
    _check("best_of_end", end, smallest, "-1 (best_of stays), ")
    now = rollout.over_the_run("best_of_end", best_of or smallest, end or smallest)
    even = 2 * int(now / 2 + 0.5 + 1e-9)  # equal steps may come to 6.999...
    return even if even < smallest else 0


def _check(input: str, count: int, smallest: int, also: str = "") -> None:
    if count < 0 or count % 2 or count > smallest:
        raise ValueError(f'input "{input}": found {count}, accepted: {also}0 (all), or an even number up to the {smallest} of a group')


def combine(scores: Scores, clamp: float = 5.0, combination: str = NORMALISE_FIRST, best_of: int = 0, estimator: str = GROUP,
            min_advantage: float = 0.0) -> Advantages:
    """The advantages of a rollout by all its rewards, clamped to +-clamp.

    NORMALISE_FIRST: sum_k w_k A(r_k), an advantage for each reward (arXiv 2505.07818, algorithm 1); a group is flat when it is
    for every reward of non-zero weight. SUM_FIRST: A(sum_k w_k r_k), so that units count; a group is flat when its sums are.

    best_of: 0, or how many of each group are trained, the best and the worst by the advantage before it is clamped (as the
    published code's `--bestofn`); all of the group are compared with. Flat groups train nothing either way.
    estimator: A, one of `groups.ESTIMATORS`.
    min_advantage: samples whose advantage is nearer to 0 before it is clamped are not trained; `best_of` chooses first.

    Raises:
        ValueError: `best_of` does not fit the groups, a score is not finite, or a group has one member.
    """
    rollout, groups = scores.rollout, scores.rollout.groups.cpu()
    columns = [(column.name, column.weight, column.used.cpu()) for column in scores.columns]
    if combination == SUM_FIRST:
        columns = [("", 1.0, sum(weight * values.double() for _, weight, values in columns))]
    total, flat, history = torch.zeros(len(groups)), torch.ones(int(groups.max()) + 1, dtype=torch.bool), None
    for name, weight, values in columns:
        past = (rollout, rollout.history.get(name, {})) if estimator in estimators.REMEMBERING else ()
        found, flat_here, remembered = of_one_reward(values, groups, estimator, *past)
        total = total + weight * found.float()
        flat = flat & (flat_here | (weight == 0))
        if remembered is not None:
            history = {**(history or rollout.history), name: remembered}
    trained = ~flat[groups]
    if best_of:
        trained = trained & best_and_worst(total, groups, rollout.indices.cpu(), best_of)
    below = trained & (total.abs() < min_advantage)
    return Advantages(scores, total.clamp(-clamp, clamp), flat, trained & ~below, history, int(below.sum()))
