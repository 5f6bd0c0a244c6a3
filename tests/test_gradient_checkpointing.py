"""Activations that are computed again: the same rollout, ratio and gradient, and blocks that do run twice."""

import pytest
import torch

from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.runs.prompt_cache import encode

SIZE, PROMPTS = Size(64, 64), ("a large red circle in the center on a white background", "a small blue star")


class Recorder(Learner):
    def optimizer_step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items()}
        super().optimizer_step()


def iteration(policy, on):
    """(gradients, statistics, calls of the first block in training)."""
    adapter = Adapter(policy, LoraSettings(4, 4.0, "attention and feed-forward"))
    calls = []
    hook = policy.denoiser.transformer_blocks[0].register_forward_pre_hook(lambda *inputs: calls.append(torch.is_grad_enabled()))
    policy.checkpoint_gradients(on)
    try:
        source = torch.Generator().manual_seed(3)
        for p in adapter.parameters.values():
            p.data.add_(torch.randn(p.shape, generator=source) * 0.05)
        learner = Recorder(policy, adapter.parameters, OptimizerSettings(), "run")
        plan = SamplingPlan(policy.time_grid(4, 3.0, SIZE), "dance_sde", 0.7, 3.5, SIZE)
        request = Request(PROMPTS, 2, policy.latent_shape(SIZE), seed=1, iteration=0, micro_batch=2)
        rollout = sample(policy, request, encode(policy, PROMPTS, SIZE), plan, learner.version)
        stats = update(learner, combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),))), UpdateSettings(train_fraction=1.0))
        return learner.gradients, stats, sum(calls)
    finally:
        policy.checkpoint_gradients(False)
        hook.remove()
        adapter.remove()


def test_the_gradient_is_the_same_and_the_ratio_one(one_thread):
    policy = policies.load("embedded")
    kept, stats, calls = iteration(policy, on=False)
    again, stats_again, calls_again = iteration(policy, on=True)
    assert calls_again == 2 * calls > 0  # or nothing was computed again
    assert stats.ratio_deviation == stats_again.ratio_deviation == 0.0
    assert stats.grad_norm == stats_again.grad_norm > 0
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


@pytest.mark.parametrize("field", ["gradient_checkpointing"])
def test_a_run_may_be_resumed_with_the_other_setting(field):
    from comfy_dancegrpo.nodes.loop import NOT_IN_FINGERPRINT

    assert ("DanceGRPOLoopStart", field) in NOT_IN_FINGERPRINT
