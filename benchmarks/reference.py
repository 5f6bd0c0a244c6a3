"""DanceGRPO as published (arXiv 2505.07818, algorithm 1), as plainly as the paper has it: one sample at a time, every step a denoiser call of its own,
nothing shared, nothing batched. Only the model itself (`predict`, `decode`), encoded prompts and the reward are the library's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from comfy_dancegrpo.grpo.protocol import Conditioning, SamplingPlan
from comfy_dancegrpo.policies.base import Policy
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """latents: T + 1 of [1, ...], before each step and after the last. log_probs: T - 1 floats. picture: [1, H, W, 3] or [1, F, H, W, 3]."""

    latents: list[Tensor]
    log_probs: list[float]
    picture: Tensor


def transition(policy: Policy, x: Tensor, t: int, prompt: Conditioning, plan: SamplingPlan) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, what is decoded if it is the last step) of step t from x [1, ...]: the SDE of a flow (eq. 6 and 7), or DDIM with noise."""
    output = policy.predict(x, plan.grid.timesteps[t:t + 1], prompt, plan)
    level, level_next, eta = plan.grid.levels[t], plan.grid.levels[t + 1], plan.eta
    if plan.transition == "dance_sde":
        d = level_next - level
        x0 = x - level * output
        score = -(x - (1 - level) * x0) / level**2
        return x + output * d - eta**2 / 2 * score * d, eta * (-d).sqrt(), x0
    x0 = (x - (1 - level).sqrt() * output) / level.sqrt()
    std = eta * ((1 - level_next) / (1 - level) * (1 - level / level_next)).sqrt()
    mean = level_next.sqrt() * x0 + (1 - level_next - std**2).clamp(min=0).sqrt() * output
    return mean, std, mean


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of the Gaussian, the mean over all dimensions."""
    return (-(x_next - mean) ** 2 / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2).mean()


@torch.no_grad()
def draw(policy: Policy, noise: Tensor, prompt: Conditioning, plan: SamplingPlan, source: torch.Generator,
         seconds: Callable[[str], None]) -> Trajectory:
    """One sample from noise [1, ...]. seconds: told the phase that has just ended."""
    latents, log_probs, x, steps = [noise], [], noise, plan.grid.steps
    for t in range(steps):
        mean, std, last = transition(policy, x, t, prompt, plan)
        if t == steps - 1:
            x = last
        else:
            x = mean + std * torch.randn(mean.shape, generator=source).to(mean)
            log_probs.append(log_prob(x, mean, std).item())
        latents.append(x)
    seconds("denoise")
    picture = policy.decode(x, plan).float().cpu()
    seconds("decode")
    return Trajectory(latents, log_probs, picture)


def advantages(scores: Sequence[float], group: int) -> list[float]:
    """(r - mean) / std within each group (eq. 8)."""
    found = []
    for start in range(0, len(scores), group):
        of_group = torch.tensor(scores[start:start + group], dtype=torch.float64)
        found += ((of_group - of_group.mean()) / (of_group.std() + 1e-8)).clamp(-5, 5).tolist()
    return found


def loss(policy: Policy, x: Tensor, x_next: Tensor, t: int, prompt: Conditioning, plan: SamplingPlan, log_prob_old: float, advantage: float,
         clip_range: float) -> Tensor:
    """Of one step of one sample (eq. 8): the clipped objective, negative."""
    mean, std, _ = transition(policy, x, t, prompt, plan)
    ratio = torch.exp(log_prob(x_next, mean, std) - log_prob_old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def gradient(policy: Policy, parameters: Mapping[str, Tensor], losses: Iterable[Callable[[], Tensor]], count: int) -> dict[str, Tensor]:
    """Of the mean of `count` losses, each with a backward pass of its own."""
    for p in parameters.values():
        p.grad = None
    with torch.enable_grad():
        for of_step in losses:
            (of_step() / count).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
