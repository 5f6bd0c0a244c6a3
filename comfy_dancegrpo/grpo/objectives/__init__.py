"""Objectives: what an update minimises, for each transition by itself.

An objective is a function `(steps: Steps, low, high) -> (losses [B], outside [B] bool)` in a file of its own, and a line here. low and high: how far
its ratio may fall below 1 and rise above it; `outside` tells where it has. KL to the reference policy (`kl.py`) is added to any. One of the forward
process is a function `(draws: Draws, low, high, beta) -> (losses [B], ratios [B], outside [B] bool)`, of samples with fresh noise; beta: `nft_beta` of the
update's settings. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """processes: of the policies that it is for. old_mean: whether it needs `Steps.mean_old`. forward: whether it is of the forward process, and so of any
    rollout, with noise or without."""

    name: str
    processes: tuple[str, ...] = ("flow", "diffusion")
    old_mean: bool = False
    forward: bool = False

    @property
    def losses(self) -> Callable:
        """The function, from the module of the objective's name."""
        return getattr(importlib.import_module(f".{self.name}", __name__), self.name)


OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("clipped"),
        Objective("grpo_guard", processes=("flow",), old_mean=True),
        Objective("reinforce"),
        Objective("diffusion_nft", forward=True),
        Objective("awm", forward=True),
    )
}
