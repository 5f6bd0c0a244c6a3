"""What changes over a run by the iteration alone: the learning rate's share of its full value after the warm-up, and eta. Imports no torch: nodes list the names.

Those of `FALLING` are diffusers' `get_scheduler` of that name. They fall over the run's length, and are other ones where a run is made longer; so is
`between`. The others do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class At:
    """iteration: from 1. warmup: its length. done: how much of the rest of the run is (0 to below 1). cycles, power, rules: as `share` has them.
    lowest: the share that `LOWEST` is."""

    iteration: int
    warmup: int
    done: float
    cycles: int
    power: float
    rules: str
    lowest: float


LOWEST = 1e-7  # the learning rate in which "polynomial" ends, as diffusers has it
SCHEDULES: dict[str, Callable[[At], float]] = {
    "constant": lambda at: 1.0,
    "inverse_sqrt": lambda at: (at.warmup / at.iteration) ** 0.5,  # arXiv 1706.03762, eq. 3
    "linear": lambda at: 1 - at.done,
    "cosine": lambda at: (1 + math.cos(math.pi * at.done)) / 2,  # arXiv 1608.03983, eq. 5
    "cosine_with_restarts": lambda at: (1 + math.cos(math.pi * (at.cycles * at.done % 1))) / 2,
    "polynomial": lambda at: (1 - at.lowest) * (1 - at.done) ** at.power + at.lowest,
    "piecewise_constant": lambda at: next(of for of, until in parsed(at.rules) if at.iteration <= until),
}
FALLING = ("linear", "cosine", "cosine_with_restarts", "polynomial")


def share(schedule: str, iteration: int, warmup: int, length: int = 0, cycles: int = 1, power: float = 1.0, rules: str = "1", learning_rate: float = 1.0) -> float:
    """Linear up to 1 over `warmup` iterations, then as the schedule says.

    length: of the run, in iterations; the last of them still has more than 0. cycles: from 1 down to 0, of "cosine_with_restarts". power: of
    "polynomial", and learning_rate: its full value. rules: of "piecewise_constant" (`parsed`).
    Raises `KeyError` for a schedule that is not in `SCHEDULES`.
    """
    warmup = max(1, warmup)
    if iteration < warmup:
        return iteration / warmup
    done = min(1.0, (iteration - warmup) / max(1, length + 1 - warmup))
    return SCHEDULES[schedule](At(iteration, warmup, done, cycles, power, rules, min(1.0, LOWEST / learning_rate)))


def parsed(rules: str) -> list[tuple[float, float]]:
    """(share, last iteration that has it) of each rule, ascending: "1:100,0.1:150,0.01" is all of it up to iteration 100, a tenth up to 150, then a hundredth.

    Raises `ValueError` where it is none.
    """
    *until, last = [rule.split(":") for rule in rules.split(",")]
    found = [(float(of), float(int(iteration))) for of, iteration in until] + [(float(*last), math.inf)]
    ends = [iteration for _, iteration in found]
    if sorted(set(ends)) != ends or ends[0] < 1 or not all(0 < of < math.inf for of, _ in found):
        raise ValueError(rules)
    return found


def problem(rules: str) -> str | None:
    """The line about rules that are none; None where they are."""
    try:
        parsed(rules)
    except (TypeError, ValueError):
        return f'input "schedule_rules": found {rules!r}, accepted: shares above 0, each with the iteration that it ends with, and the last, as "1:100,0.1:150,0.01"'
    return None


def between(start: float, end: float, iteration: int, length: int) -> float:
    """Linear from `start` in the first iteration (0) of `length` to `end` in the last."""
    return start + (end - start) * min(1.0, iteration / max(1, length - 1))
