"""Evaluation: a policy with and without a LoRA, on prompts it was not trained on, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from ..grpo.protocol import Conditioning, Rollout, SamplingPlan
from ..grpo.rollout import Request, sample
from ..lora.adapter import LoraSnapshot, applied, bare
from ..policies.base import Policy
from ..rewards import Reward, distinct
from ..workflow.host import host
from .prompt_cache import encode


NOISELESS = {"flow": "ode", "diffusion": "ddim"}  # the transition that samples a process without noise, at eta 0


@dataclass(frozen=True)
class Comparison:
    """Scores of one reward before and after, [N] each: a prompt's mean over its noises, paired by prompt and noise."""

    reward: str
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)

    def summary(self) -> dict[str, float]:
        """before, after, gain (means), ci95 (its two bounds), t of the paired difference, n; None where n is too small to tell."""
        difference = (self.after - self.before).double()
        n, gain = len(difference), difference.mean().item()
        error = difference.std().item() / math.sqrt(n) if n > 1 else math.nan
        reach = t_quantile(0.975, n - 1) * error if n > 1 else math.nan
        ci95 = [gain - reach, gain + reach] if n > 1 else None
        t = gain / error if error > 0 else None if gain or n < 2 else 0.0
        return {"before": self.before.double().mean().item(), "after": self.after.double().mean().item(), "gain": gain,
                "ci95": ci95, "t": t, "n": n}

    def line(self) -> str:
        """The summary in one line."""
        s = self.summary()
        interval = f"95 %: {s['ci95'][0]:+.4f} to {s['ci95'][1]:+.4f}, " if s["ci95"] else ""
        t = f"t {s['t']:.1f}, " if s["t"] is not None else ""
        return f"{self.reward}: {s['before']:.4f} -> {s['after']:.4f}, gain {s['gain']:+.4f} ({interval}{t}{s['n']} prompts)"


@dataclass(frozen=True)
class Evaluation:
    """comparisons: one a reward. before and after: of each prompt the first pictures, [N, H, W, 3] float32 in 0..1, in the
    order of `prompts`; of videos [N, F, H, W, 3]. The first process has them, the others None."""

    prompts: tuple[str, ...] = field(repr=False)
    comparisons: tuple[Comparison, ...]
    before: Tensor | None = field(repr=False)
    after: Tensor | None = field(repr=False)


def t_quantile(p: float, degrees: int) -> float:
    """Student's t: of 1 and 2 degrees in closed form, of more by the expansion around the normal (Abramowitz and Stegun 26.7.5), within 0.13 % at 0.975."""
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return z + sum(term / degrees ** (k + 1) for k, term in enumerate(terms))


@dataclass(frozen=True)
class HeldOut:
    """What is drawn, from the same noises every time, and scored: prompts that are not trained on.

    seed: of the noises. samples_per_prompt: noises for each prompt; its score is their mean. micro_batch: samples in every denoiser call.
    """

    prompts: tuple[str, ...] = field(repr=False)
    rewards: tuple[Reward, ...]
    plan: SamplingPlan
    seed: int
    micro_batch: int
    samples_per_prompt: int = 1

    @property
    def names(self) -> list[str]:
        """Of the rewards, told apart."""
        names: list[str] = []
        for reward in self.rewards:
            names.append(distinct(reward.name, names))
        return names

    def draw(self, policy: Policy, conditioning: Conditioning, tick: Callable[[int, int], None] = lambda done, total: None) -> Rollout:
        """N * samples_per_prompt pictures or videos, a prompt's after one another, as the policy stands now; without what is trained on."""
        request = Request(self.prompts, self.samples_per_prompt, policy.latent_shape(self.plan.size), self.seed, iteration=-1,
                          shared_noise=False, micro_batch=self.micro_batch)
        return sample(policy, request, conditioning, self.plan, ("evaluation", 0), tick=tick, record=False)

    def score(self, drawn: Rollout) -> dict[str, Tensor]:
        """[N] of each reward, by name."""
        values = {name: reward.of(drawn) for name, reward in zip(self.names, self.rewards)}
        return {name: of_all.view(len(self.prompts), self.samples_per_prompt).mean(1) for name, of_all in values.items()}


def evaluate(policy: Policy, snapshot: LoraSnapshot, held_out: HeldOut) -> Evaluation:
    """Samples each prompt without and with the LoRA, from the same noises, and scores both.

    The unit of the statistics is the prompt: more samples of each steady its mean, they are not counted as more evidence.
    """
    def tick(half: int) -> Callable[[int, int], None]:
        def tell(now: int, total: int) -> None:
            host().check_interrupt()
            host().progress(half * total + now, 2 * total)
        return tell

    with torch.inference_mode(False):
        conditioning = encode(policy, held_out.prompts, held_out.plan.size)
        with bare(policy):
            before = held_out.draw(policy, conditioning, tick(0))
        with applied(policy, snapshot):
            after = held_out.draw(policy, conditioning, tick(1))
        scores = held_out.score(before), held_out.score(after)
    comparisons = tuple(Comparison(name, scores[0][name], scores[1][name]) for name in held_out.names)
    shown = slice(None, None, held_out.samples_per_prompt)
    pictures = [None if drawn.every_picture is None else drawn.every_picture[shown].clone() for drawn in (before, after)]
    return Evaluation(held_out.prompts, comparisons, *pictures)
