"""Trajectories lie in main memory: what is replayed is bit for bit what was sampled, and every tensor is where it is computed with."""

import contextlib
import dataclasses

import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo import update as updating
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.pairs import by_input
from comfy_dancegrpo.grpo.protocol import CallCount, Column, Conditioning, SamplingPlan, Scores, Size, TimeGrid
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.runs.prompt_cache import encode

PROMPTS, SIZE = ("a large red circle in the center on a white background", "a small blue star"), Size(64, 64)
SETTINGS = updating.UpdateSettings(train_fraction=1.0)


class Linear:
    """A denoiser of one weight."""

    process = "flow"

    def __init__(self, device):
        self.weight = torch.nn.Parameter(torch.ones((), device=device))

    def predict(self, latents, timesteps, conditioning, plan):
        return latents * self.weight + conditioning.tensors["c"]

    def decode(self, latents, plan):
        return latents.clamp(0, 1).view(-1, 1, 1, 3)


def on(device, transition="dance_sde"):
    levels = torch.linspace(1, 0, 5, device=device)
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), transition, 0.5, 1.0, SIZE)
    return plan, Conditioning({"c": torch.zeros(2, 1, device=device)}), Linear(device)


@pytest.mark.parametrize("transition", ["dance_sde", "flow_grpo_sde", "cps"])
@pytest.mark.parametrize("more", [{}, {"objective": "grpo_guard", "kl_weight": 0.1}, {"objective": "reinforce"},
                                  {"objective": "diffusion_nft", "kl_weight": 0.1}, {"objective": "awm"}], ids=lambda more: more.get("objective", "clipped"))
def test_replay_brings_each_micro_batch_to_the_device_that_computes(transition, more):
    """With tensors that have a device and no content: where two of different devices meet, torch raises, and a GPU is not needed."""
    plan, conditioning, policy = on("cpu", transition)
    rollout = sample(policy, Request(("a", "b"), 3, (3,), seed=0, iteration=0, micro_batch=4), conditioning, plan, ("run", 0))
    advantages = combine(Scores(rollout, (Column("toy", 1.0, torch.arange(6.0)),)))
    assert rollout.states.device.type == "cpu" and rollout.states.shape == (6, 4, 3)
    plan, conditioning, policy = on("meta", transition)
    there = dataclasses.replace(rollout, plan=plan, conditioning=conditioning, log_probs=rollout.log_probs.to("meta"))
    learner = Learner(policy, {"weight": policy.weight}, OptimizerSettings(), "run", reference=contextlib.nullcontext)
    advantages = dataclasses.replace(advantages, scores=dataclasses.replace(advantages.scores, rollout=there))
    pairs, calls = [(n, t) for n in range(6) for t in range(3)], CallCount()
    process = updating._process(advantages, dataclasses.replace(SETTINGS, **more))
    served = by_input(process.rollout, pairs)
    with torch.enable_grad():
        references = [output for _, output in updating._outputs(learner, process, pairs, served, 5, calls)] if "kl_weight" in more else []
        found = list(updating._accumulate(learner, process, pairs, served, 5, calls, references, moved=False))
    assert len(served) == (18 if process.objective.forward else 2 + 6 * 2) and calls.backward == 20 and calls.forward == (20 if "kl_weight" in more else 0)
    assert len(found) == 5 and policy.weight.grad.device.type == "meta"
    with pytest.raises(RuntimeError, match="device"):
        there.states * plan.grid.levels[:4, None]  # or the check above could not fail


def seen_by(policy, monkeypatch):
    """The latents that the denoiser is called with."""
    seen, predict = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, *rest: seen.append(x.detach().clone()) or predict(x, *rest))
    return seen


def test_what_is_replayed_is_what_was_sampled(monkeypatch, one_thread):
    policy = policies.load("embedded")
    adapter = Adapter(policy, LoraSettings(2, 2.0, "attention"))
    try:
        learner = Learner(policy, adapter.parameters, OptimizerSettings(), "run")
        plan = SamplingPlan(policy.time_grid(4, 3.0, SIZE), "dance_sde", 0.7, 3.5, SIZE)
        request = Request(PROMPTS, 3, policy.latent_shape(SIZE), seed=1, iteration=0, micro_batch=3)
        sampled = seen_by(policy, monkeypatch)
        rollout = sample(policy, request, encode(policy, PROMPTS, SIZE), plan, learner.version)
        assert torch.equal(rollout.states[:, 0], sampled[0][rollout.groups])  # a call for both groups, padded
        assert torch.equal(rollout.states[:, 1:], torch.cat([torch.stack(sampled[k:k + 3], 1) for k in (1, 4)])) and len(sampled) == 7
        replayed = seen_by(policy, monkeypatch)
        stats = updating.update(learner, combine(Scores(rollout, (Column("toy", 1.0, torch.arange(6.0)),))), SETTINGS)
        states = {row.numpy().tobytes() for row in rollout.states[:, :3].flatten(0, 1)}
        assert {row.numpy().tobytes() for x in replayed for row in x} == states and len(states) == 2 + 6 * 2  # a group shares its start
        assert stats.ratio_deviation == 0.0
    finally:
        adapter.remove()
