"""Transitions of the denoising process: each is one Gaussian, x_next ~ N(mean, std^2).

A transition is a function `(x, output, level, level_next, eta) -> Gaussian` in a file of its own, and a line here. x and output
are [B, ...]; level and level_next are broadcastable to it ([B, 1, ...]), and so is eta where it is no number: rows of eta 0 have std 0, and
their mean is that without noise. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Transition:
    """process: "flow" or "diffusion". scored: which field of the last step's Gaussian is decoded and scored.
    stochastic: whether it can have noise, and so be trained."""

    name: str
    process: str
    scored: str
    stochastic: bool = True

    @property
    def step(self) -> Callable:
        """The function, from the module of the transition's name."""
        return getattr(importlib.import_module(f".{self.name}", __name__), self.name)


TRANSITIONS: dict[str, Transition] = {
    t.name: t
    for t in (
        Transition("dance_sde", process="flow", scored="x0"),
        Transition("flow_grpo_sde", process="flow", scored="x0"),
        Transition("cps", process="flow", scored="x0"),
        Transition("ode", process="flow", scored="x0", stochastic=False),
        Transition("ddim", process="diffusion", scored="mean"),
    )
}
