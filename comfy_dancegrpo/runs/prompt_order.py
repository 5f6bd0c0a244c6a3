"""Which prompts an iteration trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import RunError
from ..grpo.learner import Learner
from ..grpo.noise import generator

LONGEST = 8  # epochs that a prompt waits at most


def prompts_of(iteration: int, prompts: tuple[str, ...], count: int, seed: int) -> tuple[str, ...]:
    """The prompts of an iteration: each epoch is a permutation keyed by (seed, epoch), read on without a break."""
    return tuple(prompts[index] for _, index in read_on(iteration * count, len(prompts), count, seed)[0])


def read_on(position: int, total: int, count: int, seed: int, waiting: Mapping[str, Sequence[int]] = {}) -> tuple[list[tuple[int, int]], int]:
    """`count` (epoch, index of a prompt), read from `position` of the epochs on, and the position after them.

    waiting: by index, (how many of its groups in a row had no spread, the first epoch in which it is read again).
    """
    picked, orders = [], {}
    while len(picked) < count:
        epoch, place = divmod(position, total)
        if epoch not in orders:
            orders[epoch] = torch.randperm(total, generator=generator("prompts", seed, epoch)).tolist()
        index = orders[epoch][place]
        if waiting.get(str(index), (0, 0))[1] <= epoch:
            picked.append((epoch, index))
        position += 1
    return picked, position


def after(state: Mapping[str, Any], total: int, count: int, seed: int, flat: Sequence[bool]) -> dict[str, Any]:
    """The state after an iteration that read `count` prompts from `state` on, whose groups were `flat` (without spread), or were not.

    A prompt whose last k groups were flat is passed over in the next min(k, `LONGEST`) epochs; one group with spread, and it waits no more.
    """
    waiting = dict(state.get("waiting", {}))
    picked, position = read_on(state.get("position", 0), total, count, seed, waiting)
    for (epoch, index), without_spread in zip(picked, flat, strict=True):
        before, _ = waiting.pop(str(index), (0, 0))
        if without_spread:
            waiting[str(index)] = [before + 1, epoch + 1 + min(before + 1, LONGEST)]
    return {"position": position, "waiting": waiting}


class PromptOrder:
    """The prompts of a run: those of `prompts_of`, or, by a curriculum, without those that wait. Its state is the learner's, so that checkpoints have it."""

    def __init__(self, prompts: tuple[str, ...], count: int, seed: int, learner: Learner, curriculum: bool):
        self.prompts, self._count, self._seed, self._learner, self._curriculum = prompts, count, seed, learner, curriculum

    def of(self, iteration: int) -> tuple[str, ...]:
        """Of the iteration that is next."""
        return self._from(iteration, 1)

    def upcoming(self, iteration: int, last: int) -> Iterator[str]:
        """Of all iterations from the next up to `last`, this one not among them; by a curriculum those that would be, if no group more had no spread."""
        yield from self._from(iteration, last - iteration)

    def end(self, flat: Sequence[bool]) -> None:
        """After an iteration: which of its groups had no spread. Raises `RunError` where they are not one for each prompt."""
        if not self._curriculum:
            return
        if len(flat) != self._count:
            raise RunError(f"the iteration had {len(flat)} groups, accepted where \"curriculum\" is on: {self._count}, one for each prompt of Loop Start")
        self._learner.curriculum = after(self._learner.curriculum, len(self.prompts), self._count, self._seed, flat)

    def _from(self, iteration: int, iterations: int) -> tuple[str, ...]:
        state = self._learner.curriculum if self._curriculum else {"position": iteration * self._count}
        picked, _ = read_on(state.get("position", 0), len(self.prompts), iterations * self._count, self._seed, state.get("waiting", {}))
        return tuple(self.prompts[index] for _, index in picked)
