"""The reverse process: the transitions of a rollout, as they were sampled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .forward import micro_batches, step
from .gaussian import Gaussian, log_prob
from .objectives.kl import kl
from .objectives.steps import Steps, ratio
from .pairs import Pair, Pairs, Seen
from .protocol import CallCount, Denoiser
from .walk import noise_of


class Reverse(Pairs):
    """A pair is the transition of a sample at a step. Losses are of the mean of its Gaussian."""

    def given(self, pairs: list[Pair]) -> tuple:
        samples, steps, rows = self.indices(pairs)
        rollout, device = self.rollout, self.device
        return (self.own(rollout.states)[rows, steps].to(device), steps.to(device), rollout.conditioning.rows(rollout.groups[samples].to(device)),
                rollout.plan, torch.ones_like(steps, dtype=torch.bool).to(device))

    def predict(self, policy: Denoiser, given: tuple, calls: CallCount, real: int) -> tuple[Tensor, Gaussian]:
        gaussian = step(policy, *given, calls, real)
        return gaussian.mean, gaussian

    def noise(self, samples: Tensor, steps: Tensor) -> Tensor:
        """[B, ...]: that of the rollout, drawn again."""
        return torch.stack([noise_of(self.rollout, *pair) for pair in zip(samples.tolist(), steps.tolist())]).to(self.device)

    def losses(self, output: Tensor, rest: Gaussian, reference: Tensor | None, served: list[list[Pair]]) -> tuple[Tensor, Seen]:
        gaussian, rollout, levels, settings = replace(rest, mean=output), self.rollout, self.rollout.plan.grid.levels, self.settings
        pairs, device = [(row, *pair) for row, pairs in enumerate(served) for pair in pairs], self.device
        states, log_probs = self.own(rollout.states), self.own(rollout.log_probs)
        total, seen = gaussian.mean.sum() * 0.0, []  # a call of padding has a gradient too, of zeros
        for part, real in micro_batches(len(pairs), rollout.micro_batch):  # in the rollout's shape: kernels round by it
            of, samples, steps = torch.tensor([pairs[k] for k in part.tolist()]).T
            rows, of = torch.tensor([self.here[n] for n in samples.tolist()]), of.to(device)
            mean, std, x_next = gaussian.mean[of], gaussian.std[of], states[rows, steps + 1].to(device)
            replayed = Steps(
                log_prob(x_next, Gaussian(mean, std, gaussian.x0.detach()[of])), log_probs[rows.to(device), steps.to(device)],
                self.advantages.values[samples].to(device), mean, std, (levels[steps] - levels[steps + 1]).abs().to(device),
                x_next - std * self.noise(samples, steps) if self.objective.old_mean else None)
            loss, outside = self.objective.losses(replayed, settings.clip_range, self.high)
            divergence = torch.zeros_like(loss) if reference is None else kl(replayed, reference[of])
            loss = loss + settings.kl_weight * divergence if settings.kl_weight else loss
            total = total + loss[:real].sum()
            seen.append(Seen(*(value[:real].detach() for value in (loss, ratio(replayed), outside, divergence))))
        none = gaussian.mean.new_zeros(0)
        return total, Seen(*(torch.cat(column) for column in zip(*seen))) if seen else Seen(none, none, none, none)
