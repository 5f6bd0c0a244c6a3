"""How much better a sample scored than others, by one reward: an equation each, on [N] float64 scores, giving the same.

groups: [N] int64 in 0..P-1, each group with at least two members. std is the unbiased one throughout, and 1e-8 keeps it from dividing by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import adjustments, value
from .groups import BATCH, BATCH_STD, GROUP, LEARNED_VALUE, LEAVE_ONE_OUT, PER_PROMPT, RANK, members

if TYPE_CHECKING:
    from .protocol import Rollout

EPSILON = 1e-8
WINDOW, FEWEST = 32, 16  # of `per_prompt`, as in DDPO's published configuration: scores remembered of a prompt, and from how many on they are used

History = Mapping[str, Sequence[float]]
"""What an estimator remembers of a reward: the last scores of each prompt, by `key`, oldest first, or a `value.State`."""


def group(values: Tensor, groups: Tensor) -> Tensor:
    """(r - mean of its group) / std of its group: GRPO (arXiv 2402.03300, section 4.1.2)."""
    return _by_group(values, groups, lambda member: (member - member.mean()) / (member.std() + EPSILON))


def group_mean_batch_std(values: Tensor, groups: Tensor) -> Tensor:
    """(r - mean of its group) / std of all scores: `global_std` of Flow-GRPO's published code, and arXiv 2508.08221."""
    return _by_group(values, groups, lambda member: member - member.mean()) / (values.std() + EPSILON)


def batch(values: Tensor, groups: Tensor) -> Tensor:
    """(r - mean of all scores) / std of all scores: DDPO (arXiv 2305.13301) without statistics of each prompt."""
    return (values - values.mean()) / (values.std() + EPSILON)


def rank(values: Tensor, groups: Tensor) -> Tensor:
    """`group` of the ranks in the group in place of the scores (fitness shaping, arXiv 1106.4487); ties share a rank."""
    return group(adjustments.rank(values, groups), groups)


def leave_one_out(values: Tensor, groups: Tensor) -> Tensor:
    """r - mean of the others of its group: RLOO (arXiv 2402.14740). In the reward's own units: nothing divides by a spread."""
    return _by_group(values, groups, lambda member: member - (member.sum() - member) / (len(member) - 1))


def per_prompt(values: Tensor, rollout: Rollout, history: History) -> tuple[Tensor, History]:
    """(r - mean) / std of the prompt's last `WINDOW` scores, these among them: DDPO (arXiv 2305.13301; `per_prompt_stat_tracking` of its code).

    Those of all scores of this iteration stand in where there are fewer than `FEWEST` of the prompt.

    Args:
        rollout: whose prompts scores are remembered by. history: of the iterations before.

    Returns:
        The advantages [N], and the history with these scores.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(rollout.prompts):
        rows.setdefault(key(prompt), []).append(row)
    history = {**history, **{name: [*history.get(name, ()), *values[of_prompt].tolist()][-WINDOW:] for name, of_prompt in rows.items()}}
    found = torch.empty_like(values)
    for name, of_prompt in rows.items():
        known = values if len(history[name]) < FEWEST else torch.tensor(history[name], dtype=values.dtype)
        found[of_prompt] = (values[of_prompt] - known.mean()) / (known.std() + EPSILON)
    return found, history


def learned_value(values: Tensor, rollout: Rollout, history: History) -> tuple[Tensor, History]:
    """(r - V) / std of all r - V, with V the value of the prompt (`value`) as it was before it saw these scores: the baseline of DPOK (arXiv 2305.16381).
    At first V is the mean of these scores, and the advantages are those of `batch`.

    Returns:
        The advantages [N], and the value fitted to these scores.
    """
    z = value.features(rollout.conditioning, rollout.seed)[rollout.groups.cpu()]
    history = history or value.begun(values, z, rollout.seed)
    residuals = values - value.expected(history, z)
    return residuals / (residuals.std() + EPSILON), value.fitted(history, values, z)


def key(prompt: str) -> str:
    """What tells a prompt from others: its text, and the picture that it comes with."""
    picture = getattr(prompt, "picture", None)
    return str(prompt) if picture is None else f"{prompt}\n{picture.digest()}"


def _by_group(values: Tensor, groups: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    found = torch.empty_like(values)
    for rows in members(groups):
        found[rows] = of(values[rows])
    return found


OF_ONE_ITERATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    GROUP: group, BATCH_STD: group_mean_batch_std, BATCH: batch, RANK: rank, LEAVE_ONE_OUT: leave_one_out,
}
REMEMBERING: dict[str, Callable[[Tensor, Rollout, History], tuple[Tensor, History]]] = {PER_PROMPT: per_prompt, LEARNED_VALUE: learned_value}
