"""Trajectories on their way from noise to data, in denoiser calls of the run's one batch shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import processes
from .forward import micro_batches, step, timetable
from .gaussian import Gaussian, log_prob
from .noise import generator
from .protocol import CallCount, Conditioning, Denoiser, Rollout, at_least_float32
from .transitions import TRANSITIONS

if TYPE_CHECKING:
    from .rollout import Work


def noise_of(rollout: Rollout, sample: int, t: int) -> Tensor:
    """[...] on the CPU, what was drawn for one of the N samples at a step that had noise: `Walk` draws a step's after those of the steps before."""
    group, like = int(rollout.groups[sample]), at_least_float32(rollout.states[:0])
    source = generator("step", rollout.seed, rollout.iteration, group, int(rollout.indices[sample]))
    for _ in range(1 + int(rollout.noisy[group, :t].sum())):
        noise = torch.randn(like.shape[2:], dtype=like.dtype, generator=source)
    return noise


Call = list[tuple[int, int]]
"""(row, step) of each real row of a denoiser call."""


class Walk:
    """This process's samples: R rows, at least one (of a process without samples it is a stand-in that nobody sees).

    x: [R, ...] on the device, each row's latents now, and at last what is decoded. states: [R, T, ...] on the CPU, where they are recorded.
    log_probs: [R, T - 1], 0 where there is no noise.
    """

    def __init__(self, policy: Denoiser, work: Work, conditioning: Conditioning, rows: Tensor, noise: Tensor, record: bool) -> None:
        """rows: [R] places of the request. noise: [R, ...], where they begin."""
        request, levels, steps = work.request, work.plan.grid.levels, work.plan.grid.steps
        self.policy, self.work, self.conditioning, self.calls, self.size = policy, work, conditioning, CallCount(), request.micro_batch
        self.groups, self.x = request.groups[rows], noise.to(levels.device)
        self.x0 = torch.zeros_like(self.x) if bool(work.second_order.any()) else None  # of each row's step before
        self.sources = [generator("step", request.seed, request.iteration, g, i) for g, i in zip(self.groups.tolist(), request.indices[rows].tolist())]
        # on an accelerator they would lie idle until they are replayed
        self.states = torch.zeros((len(rows), steps, *noise.shape[1:]), dtype=noise.dtype, pin_memory=levels.is_cuda) if record else None
        self.log_probs = torch.zeros(len(rows), steps - 1, dtype=at_least_float32(noise[:0]).dtype, device=levels.device)

    def finished(self) -> Iterator[tuple[Tensor, int]]:
        """The rows as they come to their ends, in their order: (index [B] int64 padded to the run's batch shape, real rows), equally often in every process."""
        count, steps, scored = len(self.work.places), self.work.plan.grid.steps, TRANSITIONS[self.work.plan.transition].scored
        if bool(self.work.common.any()):
            self._together()
        most = max(processes.all_of(count))
        parts, left = micro_batches(count, self.size, -(-most // self.size)), set(range(count))
        part, real = next(parts, (None, 0))
        ways = [range(int(self.work.common[self.groups[row]]), steps) for row in range(count)]
        for call, before, gaussian in self._calls(self.x, self.groups, ways):
            for (row, t), value in zip(call, before):
                self._keep(row, t, value)
            ended = [k for k, (_, t) in enumerate(call) if t == steps - 1]
            gaussian = self._solved(call, gaussian)
            self._go_on(call, gaussian)
            if ended:
                self.x[[call[k][0] for k in ended]] = at_least_float32(getattr(gaussian, scored))[ended]
                left -= {call[k][0] for k in ended}
            while part is not None and left.isdisjoint(part.tolist()):
                yield part, real
                part, real = next(parts, (None, 0))
        if part is not None:  # of a process without samples
            yield from ((part, real), *parts)

    def _together(self) -> None:
        """The rows through the steps that their groups have in common, each of which is one row of a call; the last of these has noise, and there they part."""
        own, common = range(len(self.work.places)), self.work.common
        members: dict[int, list[int]] = {}
        for row in own:
            members.setdefault(int(self.groups[row]), []).append(row)
        heads, at = list(members), {group: k for k, group in enumerate(members)}
        x = self.x[[rows[0] for rows in members.values()] or [0]]
        std = x.new_zeros(len(x), *[1] * (x.ndim - 1))
        for call, before, gaussian in self._calls(x, self.groups[[members[head][0] for head in heads] or [0]], [range(int(common[head])) for head in heads]):
            for (k, t), value in zip(call, before):
                for row in members[heads[k]]:
                    self._keep(row, t, value)
            rows = [k for k, _ in call]
            x[rows], std[rows] = at_least_float32(gaussian.mean)[:len(call)], gaussian.std.expand(-1, *std.shape[1:])[:len(call)].to(std.dtype)
        for part, real in micro_batches(len(own), self.size) if heads else ():
            groups = [at[int(self.groups[row])] for row in part.tolist()]
            call = [(row, int(common[self.groups[row]]) - 1) for row in part[:real].tolist()]
            self._go_on(call, Gaussian(mean=x[groups], std=std[groups], x0=x[groups]))

    def _calls(self, x: Tensor, groups: Tensor, ways: Sequence[range]) -> Iterator[tuple[Call, Tensor, Gaussian]]:
        """Each call, its real rows' latents before it [len(call), ...], and the Gaussian of all its rows; whoever is given them writes into `x` what
        the rows' next steps begin from. Every process makes as many calls as any other.

        x: [R, ...]. groups: [R]. ways: the steps of each row but the stand-in's.
        """
        table, plan = timetable(ways, self.size), self.work.plan
        for call in table + [[]] * (max(processes.all_of(len(table))) - len(table)):
            processes.check_interrupt()  # here, where all are at the same call: when samples are finished differs
            padded = call or [(0, 0)]
            rows, steps = torch.tensor(padded + padded[-1:] * (self.size - len(padded))).T
            noisy, of = self.work.noisy[groups[rows], steps].to(x.device), groups[rows].to(x.device)
            before = x[rows.to(x.device)]
            gaussian = step(self.policy, before, steps.to(x.device), self.conditioning.rows(of), plan, noisy, self.calls, len(call))
            if call:
                yield call, before[:len(call)], gaussian

    def _solved(self, call: Call, gaussian: Gaussian) -> Gaussian:
        """The Gaussian [B, ...], its mean that of order 2 in the real rows whose step is of it; the others' and the std are as they were."""
        if self.x0 is None:
            return gaussian
        rows, x0, mean = [row for row, _ in call], at_least_float32(gaussian.x0)[:len(call)], at_least_float32(gaussian.mean).clone()
        weights = torch.stack([self.work.second_order[self.groups[row], t] for row, t in call])
        k = weights.nonzero()[:, 0].tolist()
        if k:
            weight = weights[k].to(mean.dtype).to(mean.device).view(-1, *[1] * (mean.ndim - 1))
            mean[k] = mean[k] + weight * (x0[k] - self.x0[[rows[j] for j in k]])
        self.x0[rows] = x0
        return replace(gaussian, mean=mean)

    def _go_on(self, call: Call, gaussian: Gaussian) -> None:
        """The real rows go to x_next ~ the Gaussian [B, ...], each with noise from its own generator, or without to its mean."""
        mean, last = at_least_float32(gaussian.mean), self.work.plan.grid.steps - 1
        drawn = [t < last and bool(self.work.noisy[self.groups[row], t]) for row, t in call]
        rows, k = [row for row, _ in call], [k for k, has in enumerate(drawn) if has]
        if not k:
            self.x[rows] = mean[:len(call)]
            return
        noise = torch.zeros(mean.shape, dtype=mean.dtype)
        for j in k:
            noise[j] = torch.randn(mean.shape[1:], dtype=mean.dtype, generator=self.sources[rows[j]])
        x_next = mean + gaussian.std * noise.to(mean.device)
        self.x[rows] = x_next[:len(call)]
        self.log_probs[[rows[j] for j in k], [call[j][1] for j in k]] = log_prob(x_next, gaussian)[k]  # of all rows: kernels round by the shape

    def _keep(self, row: int, t: int, value: Tensor) -> None:
        if self.states is not None:
            self.states[row, t].copy_(value, non_blocking=True)
