"""Scores of pictures while the rest of their rollout is still drawn, by rewards that compute elsewhere than the policy does.

A reward is given the very batches that it would be given afterwards, so that its scores are the same bit for bit. It works in threads: one for each
call that may be under way to another program, and one for all that compute here together. What fails there stops the sampling; what is said there is told by the thread
that executes.
"""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import processes
from ..errors import DanceGRPOError, Interrupted
from ..workflow.host import Behind, host
from .base import Reward

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOOK = 0.1  # seconds between two looks at the stop button
_LEAVE = 10.0  # seconds that a thread is waited for which was told to stop


@dataclass(frozen=True)
class Linked:
    """A reward by which a Score node will score a rollout's own pictures. label: of that node."""

    reward: Reward
    label: str


def elsewhere(reward: Reward, device: torch.device) -> bool:
    """Whether it computes while the policy does, on `device`, without taking its time."""
    if reward.waits:
        return True
    if not reward.modules:  # measured on the CPU
        return device.type != "cpu"
    return reward.is_beside(device)


class Scoring:
    """Of one loop: which rewards score what each of its Group Sample nodes draws."""

    def __init__(self) -> None:
        self._linked: Mapping[str, Sequence[Linked]] = {}
        self._open: weakref.WeakSet[Early] = weakref.WeakSet()

    def link(self, linked: Mapping[str, Sequence[Linked]]) -> None:
        """By the ids of the nodes."""
        self._linked = linked

    def begin(self, node_id: str, prompts: Sequence[str]) -> Early:
        """The node is about to draw samples for these prompts, in this process. Use as a context around the drawing."""
        early = Early([], prompts)
        if prompts:
            rewards = {linked.reward: linked for linked in self._linked.get(node_id, ()) if elsewhere(linked.reward, processes.device())}
            for reward in rewards:
                host().load(reward)
            early = Early(list(rewards.values()), prompts)
        self._open.add(early)
        return early

    def close(self) -> None:
        """Nobody waits for scores any more."""
        for early in list(self._open):
            early.stop()


class Early:
    """The scores of one rollout's pictures. On leaving it as a context with an error, the scoring stops; else it goes on."""

    def __init__(self, linked: Sequence[Linked], prompts: Sequence[str]):
        self._labels = {one.reward: one.label for one in linked}
        self._scores: dict[Reward, concurrent.futures.Future[Tensor]] = {reward: concurrent.futures.Future() for reward in self._labels}
        self._prompts, self._pictures = tuple(prompts), []
        self._taken, self._parts = dict.fromkeys(self._labels, 0), {reward: {} for reward in self._labels}  # by where they begin
        self._news, self._behind = threading.Condition(), Behind()
        here = [reward for reward in self._labels if not reward.waits]
        shares = [here] * bool(here) + [[reward] for reward in self._labels for _ in range(reward.calls_at_once(len(prompts)))]
        self._threads = [threading.Thread(target=self._behind.run, args=(self._work, rewards, _cuda_device()), daemon=True) for rewards in shares]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Early:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.stop()

    # -- called by the thread that executes ----------------------------------------------------------------------------
    def add(self, pictures: Tensor) -> None:
        """The next samples that were drawn: pictures [n, H, W, 3] or videos [n, F, H, W, 3]."""
        if self._threads:
            with self._news:
                self._pictures.extend(pictures)
                self._news.notify_all()

    def check(self) -> None:
        """Tells what was said, and raises what failed, as an error of the Score node."""
        self._behind.tell()
        for reward, future in self._scores.items():
            if future.done() and (error := future.exception()) is not None:
                raise error.at(self._labels[reward]) if isinstance(error, DanceGRPOError) and not isinstance(error, Interrupted) else error

    def of(self, reward: Reward) -> Tensor | None:
        """[n] float32, waited for; None where this reward scores afterwards. Raises what the reward raised."""
        future = self._scores.get(reward)
        if future is None:
            return None
        while not future.done():
            host().check_interrupt()
            self._behind.tell()
            concurrent.futures.wait([future], timeout=_LOOK)
        self._behind.tell()
        reward.done()
        return future.result()

    def stop(self) -> None:
        """Ends the threads, one that is in the middle of a batch after it."""
        self._behind.stop()
        with self._news:
            self._news.notify_all()
        for thread in self._threads:
            thread.join(_LEAVE)

    # -- in the threads ------------------------------------------------------------------------------------------------
    def _work(self, rewards: Sequence[Reward], cuda_device: int | None) -> None:
        import torch

        if cuda_device is not None:  # each thread has a current device of its own
            torch.cuda.set_device(cuda_device)
        reward = None
        try:
            with processes.outside_inference_mode():
                while (piece := self._next(rewards)) is not None:
                    reward, start, end = piece
                    self._found(reward, start, reward(torch.stack(self._pictures[start:end]), self._prompts[start:end]))
                    reward = None
        except BaseException as error:  # the thread that executes raises it
            stopped = reward is None or isinstance(error, Interrupted)
            self._failed(rewards if stopped else [reward], error)
            if not stopped:
                self._work(rewards, None)  # with the others

    def _next(self, rewards: Sequence[Reward]) -> tuple[Reward, int, int] | None:
        """From which sample to which one of them is to score; None when all are taken. Raises `Interrupted` where nobody waits for the scores."""
        total = len(self._prompts)
        with self._news:
            while True:
                host().check_interrupt()
                left = [reward for reward in rewards if self._taken[reward] < total]
                if not left:
                    return None
                drawn = len(self._pictures)
                for reward in left if drawn else ():
                    start = self._taken[reward]
                    end = start + reward.piece(self._pictures[0])
                    if end <= drawn or drawn == total:
                        self._taken[reward] = min(end, total)
                        return reward, start, self._taken[reward]
                self._news.wait()

    def _found(self, reward: Reward, start: int, values: Tensor) -> None:
        import torch

        with self._news:
            parts = self._parts[reward]
            parts[start] = values
            if sum(map(len, parts.values())) == len(self._prompts) and not self._scores[reward].done():
                self._scores[reward].set_result(torch.cat([parts[start] for start in sorted(parts)]))

    def _failed(self, rewards: Sequence[Reward], error: BaseException) -> None:
        with self._news:
            for reward in rewards:
                self._taken[reward] = len(self._prompts)
                if not self._scores[reward].done():
                    self._scores[reward].set_exception(error)


def _cuda_device() -> int | None:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
