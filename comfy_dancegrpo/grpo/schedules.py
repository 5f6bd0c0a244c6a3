"""What the learning rate does after its warm-up: its share of the full value, by the iteration (from 1).

None depends on how many iterations there will be, so that a run may be made longer. Imports no torch: nodes list the names.
"""

from __future__ import annotations

from collections.abc import Callable

SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda iteration, warmup: 1.0,
    "inverse_sqrt": lambda iteration, warmup: (warmup / iteration) ** 0.5,  # arXiv 1706.03762, eq. 3
}


def share(schedule: str, iteration: int, warmup: int) -> float:
    """Linear up to 1 over `warmup` iterations, then as the schedule says. Raises `KeyError` for one that is not in `SCHEDULES`."""
    warmup = max(1, warmup)
    return iteration / warmup if iteration < warmup else SCHEDULES[schedule](iteration, warmup)
