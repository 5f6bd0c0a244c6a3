"""How many denoiser calls an iteration takes, in closed form (docs/speed.md); no line of the trainer is used here. Importing this imports no torch.

P prompts, groups of G, T steps; c of a group: the steps that it has in common; B: the micro-batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Calls:
    """calls of the denoiser, the samples in them, and how many of these are padding."""

    calls: int = 0
    samples: int = 0
    padding: int = 0

    @classmethod
    def of(cls, inputs: int, calls: int, size: int) -> Calls:
        return cls(calls, calls * size, calls * size - inputs)

    def __add__(self, other: Calls) -> Calls:
        return Calls(self.calls + other.calls, self.samples + other.samples, self.padding + other.padding)

    def times(self, sides: int) -> Calls:
        """With classifier-free guidance every call is two."""
        return Calls(self.calls * sides, self.samples * sides, self.padding * sides)


def rollout(common: Sequence[int], group: int, steps: int, size: int) -> Calls:
    """sum over groups of c + G (T - c) inputs, in calls of `size`: first the groups as one, then each sample by itself.

    common: c of each of the P groups.
    """
    inputs = sum(c + group * (steps - c) for c in common)
    return Calls.of(inputs, rounds([c for c in common if c], size) + rounds([steps - c for c in common for _ in range(group)], size), size)


def rounds(lengths: Sequence[int], size: int) -> int:
    """How many calls of `size` rows a list of rows takes, of so many steps each: a row that has ended makes room for the next.

    ceil(R / B) L for R rows of one length L; in general the makespan of list scheduling (Graham 1966), at least the mean and at most that and one row more.
    """
    free = [0] * size
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def replay(pairs: Sequence[Iterable[tuple[int, int]]], common: Sequence[int], group: int, size: int) -> Calls:
    """Of each optimizer step the different inputs of its (sample, step) pairs: a step that a group has in common counts once for the group."""
    total = Calls()
    for of_step in pairs:
        inputs = len({("group", n // group, t) if t < common[n // group] else ("sample", n, t) for n, t in of_step})
        total += Calls.of(inputs, math.ceil(inputs / size), size)
    return total


def reference(prompts: int, group: int, steps: int, fraction: float) -> tuple[Calls, Calls]:
    """As published: (rollout, replay), each sample and each step a call of its own."""
    trained = prompts * group * max(1, round(fraction * (steps - 1)))
    return Calls.of(prompts * group * steps, prompts * group * steps, 1), Calls.of(trained, trained, 1)


def expected(mode: str, group: int, steps: int, shared: bool = True, fraction: float = 0.6, window: int = 4, share: float = 1.0) -> tuple[float, float]:
    """Inputs for each prompt of (rollout, replay in one optimizer step), on average over what is drawn: the place of a window or a branch, the trained steps.

    With K steps that have noise, m of them trained, q = m / K, and W steps where noise may be:
    rollout c + G (T - c); replay G m - G q + 1 - (1 - q)^G. c = 1, or 1 + (W - K) / 2 for a window or a branch; independent noise: G T and G m.
    """
    within = max(1, round(share * (steps - 1)))
    noisy = {"all": steps - 1, "window": window, "branch": 1}[mode]
    trained = max(1, round(fraction * noisy))
    if not shared:
        return float(group * steps), float(group * trained)
    common, q = 1 + (0 if mode == "all" else (within - noisy) / 2), trained / noisy
    return common + group * (steps - common), group * trained - group * q + 1 - (1 - q) ** group
