"""A training of an embedded policy without a graph or a run folder around it, and how well it draws captions that it is not trained on."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from comfy_dancegrpo import policies, rewards
from comfy_dancegrpo.grpo.learner import Learner
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores
from comfy_dancegrpo.grpo.rollout import sample
from comfy_dancegrpo.grpo.update import update
from comfy_dancegrpo.lora.adapter import bare
from comfy_dancegrpo.runs.evaluate import NOISELESS, HeldOut
from comfy_dancegrpo.runs.prompt_cache import PromptCache, encode
from comfy_dancegrpo.runs.prompt_order import prompts_of
from torch import Tensor

from .settings import BACKWARD, Setting

NOISE_SEED = 1000  # of the evaluation


class Trial:
    """A LoRA, or all weights, in training, as a context. iteration: how many are done; calls: of the denoiser in them (samples, padding included, backward counted as 3).

    seconds: of training alone; on a CPU those that the process computed, so that other work beside it does not count.
    """

    def __init__(self, setting: Setting, seed: int, prompts: Sequence[str], held_out: Sequence[str], device: str = "cpu", noises: int = 2) -> None:
        """prompts: trained on. held_out: captions that are evaluated on, `noises` pictures of each."""
        self.setting, self.seed, self.prompts, self._device = setting, seed, tuple(prompts), torch.device(device)
        self.policy, self._reward = policies.load(setting.policy), rewards.load("clip_score", batch_size=64)
        self.policy.to(self._device)
        self._plan, self._cache = setting.plan(self.policy), PromptCache(self.policy)
        still = SamplingPlan(self._plan.grid, NOISELESS[self.policy.process], 0.0, setting.guidance_scale, setting.size)
        self._held = HeldOut(tuple(held_out), (self._reward, rewards.load("shapes_agreement")), still, NOISE_SEED, 32, noises)
        self._conditioning = encode(self.policy, held_out, setting.size)
        self._adapter = setting.lora.attach(self.policy, seed)
        self._learner = Learner(self.policy, self._adapter.parameters, setting.optimizer, "trial", reference=functools.partial(bare, self.policy))
        self.iteration, self.calls, self.seconds = 0, 0, 0.0

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *error) -> None:
        self._adapter.remove()

    def iterate(self) -> None:
        """Raises `NotFinite` as `update` does."""
        setting, learner, start = self.setting, self._learner, self._clock()
        prompts = prompts_of(self.iteration, self.prompts, setting.prompts_per_iteration, self.seed)
        rollout = sample(self.policy, setting.request(self.policy, prompts, self.seed, self.iteration), self._cache.get(prompts, setting.size), self._plan,
                         learner.version)
        rollout = replace(rollout, history=learner.history)
        column = Column(self._reward.name, 1.0, self._reward.of(rollout))
        stats = update(learner, setting.advantages(Scores(rollout, (column,))), setting.update)
        both = rollout.calls + stats.calls
        self.seconds += self._clock() - start
        self.calls += both.forward + BACKWARD * both.backward
        self.iteration += 1

    def scores(self) -> dict[str, Tensor]:
        """[captions] each, of the moving average, as it is saved: "reward", by which it is trained, and "exact", which watches."""
        weights = {name: value.to(self._device) for name, value in self._learner.weights().items()}
        with self._learner.holding(weights):
            found = self._held.score(self._held.draw(self.policy, self._conditioning))
        return dict(zip(("reward", "exact"), found.values()))

    def _clock(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()
