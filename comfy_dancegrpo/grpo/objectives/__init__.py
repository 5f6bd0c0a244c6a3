"""Objectives: what an update minimises, for each transition by itself.

An objective is a function `(steps: Steps, low, high) -> (losses [B], outside [B] bool)` in a file of its own, and a line here. low and high: how far
its ratio may fall below 1 and rise above it; `outside` tells where it has. KL to the reference policy (`kl.py`) is added to any. Importing this
package imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """processes: of the policies that it is for. old_mean: whether it needs `Steps.mean_old`."""

    name: str
    processes: tuple[str, ...] = ("flow", "diffusion")
    old_mean: bool = False

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
    )
}
