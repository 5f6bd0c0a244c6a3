"""What the learning rate does after its warm-up: its share of the full value, by the iteration (from 1). Imports no torch: nodes list the names.

Those of `FALLING` are diffusers' `get_scheduler` of that name. They fall over the run's length, and are other ones where a run is made longer; the
others do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[int, int, float, int], float]] = {
    # by the iteration, the warm-up's length, how much of the rest of the run is done (0 to below 1), and the number of cycles
    "constant": lambda iteration, warmup, done, cycles: 1.0,
    "inverse_sqrt": lambda iteration, warmup, done, cycles: (warmup / iteration) ** 0.5,  # arXiv 1706.03762, eq. 3
    "linear": lambda iteration, warmup, done, cycles: 1 - done,
    "cosine": lambda iteration, warmup, done, cycles: (1 + math.cos(math.pi * done)) / 2,  # arXiv 1608.03983, eq. 5
    "cosine_with_restarts": lambda iteration, warmup, done, cycles: (1 + math.cos(math.pi * (cycles * done % 1))) / 2,
}
FALLING = ("linear", "cosine", "cosine_with_restarts")


def share(schedule: str, iteration: int, warmup: int, length: int = 0, cycles: int = 1) -> float:
    """Linear up to 1 over `warmup` iterations, then as the schedule says.

    length: of the run, in iterations; the last of them still has more than 0. cycles: from 1 down to 0, of "cosine_with_restarts".
    Raises `KeyError` for a schedule that is not in `SCHEDULES`.
    """
    warmup = max(1, warmup)
    if iteration < warmup:
        return iteration / warmup
    return SCHEDULES[schedule](iteration, warmup, min(1.0, (iteration - warmup) / max(1, length + 1 - warmup)), cycles)
