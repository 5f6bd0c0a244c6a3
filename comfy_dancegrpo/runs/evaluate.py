"""Evaluation: a policy with and without a LoRA, on prompts it was not trained on, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from ..grpo.protocol import Conditioning, SamplingPlan
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
    order of `prompts`; of videos [N, F, H, W, 3]."""

    prompts: tuple[str, ...] = field(repr=False)
    comparisons: tuple[Comparison, ...]
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)


def t_quantile(p: float, degrees: int) -> float:
    """Student's t, by the expansion around the normal (Abramowitz and Stegun 26.7.5); within 0.5 % from 4 degrees on."""
    z = NormalDist().inv_cdf(p)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / degrees ** (k + 1) for k, term in enumerate(terms))


def evaluate(policy: Policy, snapshot: LoraSnapshot, prompts: tuple[str, ...], rewards: Sequence[Reward], plan: SamplingPlan,
             seed: int, micro_batch: int, samples_per_prompt: int = 1) -> Evaluation:
    """Samples each prompt without and with the LoRA, from the same noises (fixed by the seed), and scores both.

    The unit of the statistics is the prompt: more samples of each steady its mean, they are not counted as more evidence.
    """
    shape = policy.latent_shape(plan.size)
    request = Request(prompts, samples_per_prompt, shape, seed, iteration=-1, shared_noise=False, micro_batch=micro_batch)
    repeated = tuple(prompts[g] for g in request.groups.tolist())

    def pictures(conditioning: Conditioning, half: int) -> Tensor:
        def tick(now: int, total: int) -> None:
            host().check_interrupt()
            host().progress(half * total + now, 2 * total)
        return sample(policy, request, conditioning, plan, ("evaluation", 0), tick=tick, record=False).pictures

    def by_prompt(reward: Reward, pictures: Tensor) -> Tensor:
        return reward(pictures, repeated).view(len(prompts), samples_per_prompt).mean(1)

    with torch.inference_mode(False):
        conditioning = encode(policy, prompts, plan.size)
        with bare(policy):
            before = pictures(conditioning, 0)
        with applied(policy, snapshot):
            after = pictures(conditioning, 1)
        comparisons: list[Comparison] = []
        for reward in rewards:
            name = distinct(reward.name, [c.reward for c in comparisons])
            comparisons.append(Comparison(name, by_prompt(reward, before), by_prompt(reward, after)))
    return Evaluation(prompts, tuple(comparisons), before[::samples_per_prompt].clone(), after[::samples_per_prompt].clone())

