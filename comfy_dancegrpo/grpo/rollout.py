"""Sampling: groups of trajectories with their log-probabilities and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import processes
from .forward import micro_batches, step
from .gaussian import Gaussian, log_prob
from .noise import generator
from .protocol import CallCount, Conditioning, Denoiser, Rollout, SamplingPlan, at_least_float32
from .transitions import TRANSITIONS


@dataclass(frozen=True)
class Request:
    """Which samples to draw: prompts (P texts) times group_size, in latents of `latent_shape` (without the batch).

    The noise of a sample depends on (seed, iteration, prompt slot, index in the group) alone. With shared_noise the whole
    group starts from the noise of its index 0 (arXiv 2505.07818, section 3.2).
    """

    prompts: tuple[str, ...]
    group_size: int
    latent_shape: tuple[int, ...]
    seed: int
    iteration: int
    shared_noise: bool = True
    micro_batch: int = 16

    @property
    def groups(self) -> Tensor:
        return torch.arange(len(self.prompts)).repeat_interleave(self.group_size)

    @property
    def indices(self) -> Tensor:
        return torch.arange(self.group_size).repeat(len(self.prompts))

    @property
    def own_prompts(self) -> tuple[str, ...]:
        """Of the samples that this process draws."""
        return tuple(self.prompts[g] for g in self.groups[self.places].tolist())

    @property
    def places(self) -> Tensor:
        """[n]: the samples that this process draws, of N; evenly spread over the order in which Update takes them, so that no process waits."""
        return torch.tensor(sorted(processes.share(update_order(self.seed, self.iteration, len(self.groups)))), dtype=torch.int64)


def update_order(seed: int, iteration: int, count: int) -> list[int]:
    """The order in which an iteration's samples are taken into optimizer steps: a permutation keyed by (seed, iteration)."""
    return torch.randperm(count, generator=generator("order", seed, iteration)).tolist()


def initial_noise(request: Request, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(rows), *latent_shape] on the CPU."""
    groups, indices = request.groups[rows].tolist(), request.indices[rows].tolist()
    return torch.stack([
        torch.randn(request.latent_shape, dtype=dtype,
                    generator=generator("initial", request.seed, request.iteration, g, 0 if request.shared_noise else i))
        for g, i in zip(groups, indices)
    ])


@torch.no_grad()
def sample(policy: Denoiser, request: Request, conditioning: Conditioning, plan: SamplingPlan, version: tuple[str, int],
           initial: Tensor | None = None, tick: Callable[[int, int], None] = lambda done, total: None, record: bool = True,
           hand: Callable[[Tensor], None] = lambda pictures: None) -> Rollout:
    """Draws this process's share of the request, micro-batch by micro-batch; every process makes as many denoiser calls as any other.

    Args:
        conditioning: P rows. version: of the policy, carried by the rollout. initial: [N, *latent_shape], in place of the
            request's own noise. tick: called after each micro-batch with (samples done, samples of this process); it may raise to stop.
        record: False keeps the pictures alone, for what is never trained on; states are then [0].
        hand: called with each micro-batch's pictures, before tick.

    Returns:
        The rollout; its log_probs are 0 where the transition has no noise.
    """
    device, levels = plan.grid.levels.device, plan.grid.levels
    places, steps, calls = request.places, plan.grid.steps, CallCount()
    count, most = len(places), -(-len(request.groups) // processes.count())
    stand_in = places if count else places.new_zeros(1)  # of a process without samples, which draws what nobody sees
    transition = TRANSITIONS[plan.transition]
    noisy = transition.stochastic and plan.eta > 0
    states, log_probs, pictures, seconds = [], [], [], {"denoise": 0.0, "decode": 0.0}
    for own, real in micro_batches(count, request.micro_batch, -(-most // request.micro_batch)):
        start, rows = time.perf_counter(), stand_in[own]
        noise = initial_noise(request, rows, levels.dtype) if initial is None else initial[rows.to(initial.device)]
        x, batch = noise.to(device), conditioning.rows(request.groups[rows].to(device))
        sources = [generator("step", request.seed, request.iteration, g, i)
                   for g, i in zip(request.groups[rows].tolist(), request.indices[rows].tolist())]
        path, densities = [], []
        for t in range(steps):
            if record:
                path.append(x)
            gaussian = step(policy, x, torch.full((len(rows),), t, device=device), batch, plan, calls, real)
            if t == steps - 1:
                break
            x = _draw(gaussian, sources) if noisy else at_least_float32(gaussian.mean)
            densities.append(log_prob(x, gaussian) if noisy else x.new_zeros(len(x)))
        latents = getattr(gaussian, transition.scored)
        decoding = time.perf_counter()
        decoded = policy.decode(latents, plan)
        if record:
            states.append(torch.stack(path, 1)[:real].cpu())  # until it is replayed it would lie idle on an accelerator
        if densities:
            log_probs.append(torch.stack(densities, 1)[:real])
        pictures.append(decoded[:real].float().cpu())
        if real:
            hand(pictures[-1])
        seconds["denoise"] += decoding - start
        seconds["decode"] += time.perf_counter() - decoding
        tick(min(int(own[0]) + request.micro_batch, count), count)
    none = levels.new_zeros(0)
    drawn = torch.cat(pictures) if pictures else torch.zeros(0)
    return Rollout(
        prompts=tuple(request.prompts[g] for g in request.groups.tolist()), groups=request.groups, indices=request.indices, places=places,
        conditioning=conditioning, plan=plan, states=torch.cat(states) if states else none,
        log_probs=torch.cat(log_probs) if log_probs else levels.new_zeros(count, steps - 1), pictures=drawn,
        every_picture=processes.gathered(drawn, places, len(request.groups), everywhere=False) if processes.count() > 1 else drawn,
        version=version, seed=request.seed, iteration=request.iteration, micro_batch=request.micro_batch,
        calls=sum(processes.all_of(calls), CallCount()), seconds=seconds,
    )


def _draw(gaussian: Gaussian, sources: list[torch.Generator]) -> Tensor:
    """x_next ~ the Gaussian, each row from its own generator."""
    mean = at_least_float32(gaussian.mean)
    noise = torch.stack([torch.randn(mean.shape[1:], dtype=mean.dtype, generator=g) for g in sources])
    return mean + gaussian.std * noise.to(mean.device)
