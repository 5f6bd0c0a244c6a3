"""The one forward function: rollout and replay both call the denoiser here, in the run's one batch shape."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gaussian import Gaussian
from .protocol import CallCount, Conditioning, Denoiser, SamplingPlan
from .transitions import TRANSITIONS


def micro_batches(count: int, size: int, parts: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Row indices in parts of exactly `size`, the last padded by repeating its last row: (index [size] int64, real rows).

    parts: how many there are at least; those beyond the rows are all padding, of the last row, or, where there is none, of row 0.
    """
    for start in range(0, max(count, parts * size), size):
        real = max(0, min(size, count - start))
        yield torch.arange(start, start + size).clamp(max=max(count - 1, 0)), real


def timetable(steps: Sequence[range], size: int) -> list[list[tuple[int, int]]]:
    """The (row, step) pairs of each denoiser call, up to `size` in one: the rows in turn, each through its own steps; one that has ended makes room."""
    waiting, under_way, table = deque((row, of_row) for row, of_row in enumerate(steps) if of_row), [], []
    while waiting or under_way:
        while waiting and len(under_way) < size:
            row, of_row = waiting.popleft()
            under_way.append((row, of_row.start))
        table.append(under_way)
        under_way = [(row, t + 1) for row, t in under_way if t + 1 < steps[row].stop]
    return table


def output_of(policy: Denoiser, x: Tensor, index: Tensor, conditioning: Conditioning, plan: SamplingPlan, calls: CallCount, real: int) -> Tensor:
    """What the denoiser says [B, ...] of latents x [B, ...], each at its own step of the plan; the rest as of `step`."""
    output = policy.predict(x, plan.grid.timesteps[index], conditioning, plan)
    calls.add(len(x), real, backward=torch.is_grad_enabled())
    return output


def step(policy: Denoiser, x: Tensor, index: Tensor, conditioning: Conditioning, plan: SamplingPlan, noisy: Tensor,
         calls: CallCount, real: int) -> Gaussian:
    """One transition of each row from its own step of the plan.

    Args:
        x: [B, ...] latents. index: [B] int64, the step (0..T-1) of each row. conditioning: B rows. noisy: [B] bool, whether it has noise.
        calls: counts this call. real: how many of the rows are not padding.
    """
    transition = TRANSITIONS[plan.transition]
    shape = (-1,) + (1,) * (x.ndim - 1)
    level, level_next = plan.grid.levels[index].view(shape), plan.grid.levels[index + 1].view(shape)
    output = output_of(policy, x, index, conditioning, plan, calls, real)
    return transition.step(x, output, level, level_next, plan.eta * noisy.to(level.dtype).view(shape))
