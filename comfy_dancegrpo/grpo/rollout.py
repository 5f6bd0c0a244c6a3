"""Sampling: groups of trajectories with their log-probabilities and pictures."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import processes
from .noise import generator
from .noise_steps import NoiseSteps, whole_groups
from .ode_solvers import DPM_PP_2M, second_order
from .protocol import CallCount, Conditioning, Denoiser, Rollout, SamplingPlan
from .transitions import TRANSITIONS
from .walk import Walk


DECODED_AT_ONCE = 2**15  # pixels, at least one sample: small ones are decoded faster together, and large ones would not fit into memory


@dataclass(frozen=True)
class Request:
    """Which samples to draw: prompts (P texts) times group_size, in latents of `latent_shape` (without the batch).

    The noise of a sample depends on (seed, iteration, prompt slot, index in the group) alone. With shared_noise the whole
    group starts from the noise of its index 0 (arXiv 2505.07818, section 3.2). noise_steps: which steps have noise.
    """

    prompts: tuple[str, ...]
    group_size: int
    latent_shape: tuple[int, ...]
    seed: int
    iteration: int
    shared_noise: bool = True
    micro_batch: int = 16
    noise_steps: NoiseSteps = NoiseSteps()

    @property
    def groups(self) -> Tensor:
        return torch.arange(len(self.prompts)).repeat_interleave(self.group_size)

    @property
    def indices(self) -> Tensor:
        return torch.arange(self.group_size).repeat(len(self.prompts))


@dataclass(frozen=True)
class Work:
    """What a request's samples go through by a plan, and which of them this process draws. Its properties are those of `Rollout`."""

    request: Request
    plan: SamplingPlan

    @functools.cached_property
    def noisy(self) -> Tensor:
        request = self.request
        steps = request.noise_steps.of(len(request.prompts), self.plan.grid.steps, request.seed, request.iteration)
        return steps if TRANSITIONS[self.plan.transition].stochastic and self.plan.eta > 0 else torch.zeros_like(steps)

    @functools.cached_property
    def common(self) -> Tensor:
        first = torch.where(self.noisy.any(1), self.noisy.int().argmax(1) + 1, 0)
        return first if self.request.shared_noise else torch.zeros_like(first)

    @functools.cached_property
    def second_order(self) -> Tensor:
        """[P, T] float64: `ode_solvers.second_order` from the second step on after a group's last with noise; 0 where a step is of order 1."""
        weights = second_order(self.plan.grid.levels, TRANSITIONS[self.plan.transition].process)
        last = self.noisy.shape[1] - 1 - self.noisy.flip(1).int().argmax(1)
        past = (torch.arange(len(weights)) >= last[:, None] + 2) & self.noisy.any(1, keepdim=True)
        return torch.where(past & (self.plan.ode_solver == DPM_PP_2M), weights, 0.0)

    @property
    def whole_groups(self) -> bool:
        return whole_groups(self.noisy, self.common)

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """A permutation keyed by (seed, iteration); of groups, where those are trained whole."""
        request, size = self.request, self.request.group_size if self.whole_groups else 1
        units = torch.randperm(len(request.groups) // size, generator=generator("order", request.seed, request.iteration)).tolist()
        return tuple(unit * size + k for unit in units for k in range(size))

    @functools.cached_property
    def places(self) -> Tensor:
        """Evenly spread over `order`, so that no process waits in Update; whole groups where those can be spread evenly."""
        even = self.whole_groups and len(self.request.prompts) % processes.teams() == 0
        size = self.request.group_size if even else 1
        own = processes.share([self.order[k:k + size] for k in range(0, len(self.order), size)])
        return torch.tensor(sorted(n for unit in own for n in unit), dtype=torch.int64)

    @property
    def own_prompts(self) -> tuple[str, ...]:
        """Of the samples that this process draws."""
        return tuple(self.request.prompts[g] for g in self.request.groups[self.places].tolist())


def initial_noise(request: Request, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(rows), *latent_shape] on the CPU."""
    groups, indices = request.groups[rows].tolist(), request.indices[rows].tolist()
    return torch.stack([
        torch.randn(request.latent_shape, dtype=dtype,
                    generator=generator("initial", request.seed, request.iteration, g, 0 if request.shared_noise else i))
        for g, i in zip(groups, indices)
    ])


def decoded(policy: Denoiser, latents: Tensor, plan: SamplingPlan) -> Tensor:
    """The pictures or videos of latents [B, ...], some at a time."""
    size = plan.size
    return torch.cat([policy.decode(part, plan) for part in latents.split(max(1, DECODED_AT_ONCE // (size.height * size.width * size.frames)))])


@torch.no_grad()
def sample(policy: Denoiser, request: Request, conditioning: Conditioning, plan: SamplingPlan, version: tuple[str, int],
           initial: Tensor | None = None, tick: Callable[[int, int], None] = lambda done, total: None, record: bool = True,
           hand: Callable[[Tensor], None] = lambda pictures: None) -> Rollout:
    """Draws this process's share of the request, micro-batch by micro-batch; every process makes as many denoiser calls as any other.

    The steps that a group has in common (those up to its first with noise, where it begins from one noise) are computed once for the group.

    Args:
        conditioning: P rows. version: of the policy, carried by the rollout. initial: [N, *latent_shape], in place of the
            request's own noise; with shared noise a group's samples must have the same. tick: called after each decoded micro-batch with
            (samples done, samples of this process); it may raise to stop.
        record: False keeps the pictures alone, for what is never trained on; states and latents are then [0].
        hand: called with each micro-batch's pictures, in the order of `places`, before tick.

    Returns:
        The rollout; its log_probs are 0 where the transition has no noise.
    """
    work = Work(request, plan)
    rows = work.places if len(work.places) else work.places.new_zeros(1)
    noise = initial_noise(request, rows, plan.grid.levels.dtype) if initial is None else initial[rows.to(initial.device)]
    walk = Walk(policy, work, conditioning, rows, noise, record)
    pictures, seconds, start = [], {"denoise": 0.0, "decode": 0.0}, time.perf_counter()
    for part, real in walk.finished():
        decoding = time.perf_counter()
        if real:
            pictures.append(decoded(policy, walk.x[part], plan)[:real].float().cpu())
            hand(pictures[-1])
        seconds["denoise"] += decoding - start
        start = time.perf_counter()
        seconds["decode"] += start - decoding
        tick(int(part[-1]) + 1 if real else len(work.places), len(work.places))
    if plan.grid.levels.is_cuda:
        torch.cuda.synchronize()  # the states have arrived
    drawn = torch.cat(pictures) if pictures else torch.zeros(0)
    count = len(work.places)
    return Rollout(
        prompts=tuple(request.prompts[g] for g in request.groups.tolist()), groups=request.groups, indices=request.indices, places=work.places,
        order=work.order, noisy=work.noisy, common=work.common, conditioning=conditioning, plan=plan,
        states=walk.states[:count] if record else plan.grid.levels.new_zeros(0),
        latents=walk.x[:count].cpu() if record else plan.grid.levels.new_zeros(0), log_probs=walk.log_probs[:count], pictures=drawn,
        every_picture=processes.gathered(drawn, work.places, len(request.groups), everywhere=False) if processes.count() > 1 else drawn,
        version=version, seed=request.seed, iteration=request.iteration, micro_batch=request.micro_batch,
        calls=sum(processes.all_teams_of(walk.calls), CallCount()), seconds=seconds,
    )
