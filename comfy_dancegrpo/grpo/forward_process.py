"""The forward process: what was sampled, with fresh noise. No transition and no log-probability of the rollout is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .forward import output_of
from .noise import generator
from .objectives.draws import Draws
from .objectives.steps import per_value
from .pairs import Pair, Pairs, Seen
from .protocol import Advantages, CallCount, Conditioning, Denoiser
from .transitions import TRANSITIONS


@dataclass(frozen=True)
class Noised:
    """pairs: B of them. x: [B, ...] their latents with noise; target: [B, ...], what the denoiser should say of them. signal, noise: [B], the parts
    of x0 and noise in x. index: [B], their steps; conditioning: B rows."""

    pairs: list[Pair]
    x: Tensor
    target: Tensor
    signal: Tensor
    noise: Tensor
    index: Tensor
    conditioning: Conditioning


def parts_of(level: Tensor, process: str) -> tuple[Tensor, Tensor]:
    """How much x0 and noise x_t has, by its level: 1 - sigma and sigma of a flow, sqrt(alpha_bar) and sqrt(1 - alpha_bar) of a diffusion."""
    return (1 - level, level) if process == "flow" else (level.sqrt(), (1 - level).sqrt())


class Forward(Pairs):
    """A pair is what was decoded of a sample, x0, with noise of the level at a step: x_t = signal x0 + noise eps. Losses are of what the denoiser says of it,
    which should be eps - x0 of a flow and eps of a diffusion; any of the steps but the last may be trained, whether the rollout had noise there or not.

    eps is drawn for (seed, iteration, group, index, step). old: what the policy that sampled says of the pairs of later optimizer steps, on the CPU; at
    the first step that is what it says now.
    """

    def __init__(self, advantages: Advantages, settings):
        super().__init__(advantages, settings)
        self.rollout = replace(self.rollout, noisy=torch.ones_like(self.rollout.noisy), common=torch.zeros_like(self.rollout.common))
        self.process = TRANSITIONS[self.rollout.plan.transition].process
        self.old: dict[Pair, Tensor] = {}

    def eps(self, sample: int, t: int) -> Tensor:
        """[...] on the CPU."""
        rollout = self.rollout
        source = generator("forward", rollout.seed, rollout.iteration, int(rollout.groups[sample]), int(rollout.indices[sample]), t)
        return torch.randn(rollout.latents.shape[1:], dtype=rollout.latents.dtype, generator=source)

    def given(self, pairs: list[Pair]) -> Noised:
        samples, steps, rows = self.indices(pairs)
        rollout, device = self.rollout, self.device
        x0, eps = self.own(rollout.latents)[rows].to(device), torch.stack([self.eps(*pair) for pair in pairs]).to(device)
        signal, noise = parts_of(rollout.plan.grid.levels[steps.to(device)].to(x0.dtype), self.process)
        shape = (-1,) + (1,) * (x0.ndim - 1)
        return Noised(pairs, signal.view(shape) * x0 + noise.view(shape) * eps, eps - x0 if self.process == "flow" else eps, signal, noise,
                      steps.to(device), rollout.conditioning.rows(rollout.groups[samples].to(device)))

    def predict(self, policy: Denoiser, given: Noised, calls: CallCount, real: int) -> tuple[Tensor, Noised]:
        return output_of(policy, given.x, given.index, given.conditioning, self.rollout.plan, calls, real), given

    def remember(self, pairs: list[Pair], output: Tensor) -> None:
        """Keeps what the policy that sampled says of pairs: the first rows of `output`."""
        self.old |= dict(zip(pairs, output.cpu()))

    def losses(self, output: Tensor, rest: Noised, reference: Tensor | None, served: list[list[Pair]]) -> tuple[Tensor, Seen]:
        settings, samples, old = self.settings, [n for n, _ in rest.pairs], output.detach().clone()
        for row, pair in enumerate(rest.pairs):
            if pair in self.old:
                old[row] = self.old[pair]
        error = rest.noise if self.process == "flow" else rest.noise / rest.signal
        draws = Draws(output, old, rest.target, self.advantages.values[samples].to(output), rest.noise, error)
        loss, rho, outside = self.objective.losses(draws, settings.clip_range, self.high, settings.nft_beta)
        divergence = torch.zeros_like(loss) if reference is None else per_value((output - reference) ** 2)
        loss = loss + settings.kl_weight * divergence if settings.kl_weight else loss
        real = len(served)
        return loss[:real].sum(), Seen(*(value[:real].detach() for value in (loss, rho, outside, divergence)))
