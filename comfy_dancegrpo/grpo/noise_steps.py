"""Which steps of a group's trajectories have noise, and so may be trained; the others take the ODE's step (`ode_solvers`). Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALL, WINDOW, BRANCH = "all", "window", "branch"
MODES = (ALL, WINDOW, BRANCH)


@dataclass(frozen=True)
class NoiseSteps:
    """ALL: every step (arXiv 2505.07818). WINDOW: `size` steps in a row, the same for all groups (MixGRPO, arXiv 2507.21802): it moves on by one
    after every `interval` iterations, and begins anew after the last, or is drawn at each iteration where interval is 0 (Flow-GRPO-Fast). BRANCH:
    one step, drawn for each group and iteration: its samples are one trajectory before it, and part there.

    share: of the steps that may be trained (all but the last), counted from the noisiest, those where a window or a branch may be.
    """

    mode: str = ALL
    size: int = 4
    interval: int = 0
    share: float = 1.0

    def of(self, groups: int, steps: int, seed: int, iteration: int) -> Tensor:
        """[groups, steps] bool. Raises `ValueError` for a window that is longer than where it may be."""
        import torch

        if self.mode == ALL:
            return torch.ones(groups, steps, dtype=torch.bool)
        within = max(1, round(self.share * (steps - 1)))
        if self.mode == BRANCH:
            first, size = [_drawn("branch", seed, iteration, within, group) for group in range(groups)], 1
        else:
            places, size = within - self.size + 1, self.size
            if places < 1:
                raise ValueError(f"found {size} steps, accepted: up to {within}, of the steps that may have noise")
            first = [iteration // self.interval % places if self.interval else _drawn("window", seed, iteration, places)] * groups
        at = torch.arange(steps) - torch.tensor(first)[:, None]
        return (at >= 0) & (at < size)


def whole_groups(noisy: Tensor, common: Tensor) -> bool:
    """Whether all that is trained of a group has one input: then a group that stays together is trained by one denoiser call.

    noisy: [P, T] bool, which steps have noise. common: [P] int64, how many of the first steps have one input for the whole group.
    """
    return bool((common > 0).all()) and bool((noisy[:, :-1].sum(1) <= 1).all())


def _drawn(name: str, seed: int, iteration: int, below: int, *key: int) -> int:
    import torch

    from .noise import generator

    return int(torch.randint(below, (1,), generator=generator(name, seed, iteration, *key)))
