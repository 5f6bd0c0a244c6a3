"""The one forward function: rollout and replay both call the denoiser here, in the run's one batch shape."""

from __future__ import annotations

from collections.abc import Iterator

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


def step(policy: Denoiser, x: Tensor, index: Tensor, conditioning: Conditioning, plan: SamplingPlan,
         calls: CallCount, real: int) -> Gaussian:
    """One transition of each row from its own step of the plan.

    Args:
        x: [B, ...] latents. index: [B] int64, the step (0..T-1) of each row. conditioning: B rows.
        calls: counts this call. real: how many of the rows are not padding.
    """
    transition = TRANSITIONS[plan.transition]
    shape = (-1,) + (1,) * (x.ndim - 1)
    level, level_next = plan.grid.levels[index].view(shape), plan.grid.levels[index + 1].view(shape)
    output = policy.predict(x, plan.grid.timesteps[index], conditioning, plan)
    calls.add(len(x), real, backward=torch.is_grad_enabled())
    return transition.step(x, output, level, level_next, plan.eta)
