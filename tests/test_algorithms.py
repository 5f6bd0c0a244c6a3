"""The choices of an algorithm on the embedded policies: whichever is taken, the replay is the rollout bit for bit, and something is learned from it."""

import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.transitions import TRANSITIONS
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.runs.prompt_cache import encode

PROMPTS = ("a large red circle in the center on a white background", "a small blue star at the top left")
SIZE, STEPS = Size(64, 64), 4
POLICIES = {"flow": "embedded", "diffusion": "embedded_diffusion"}


@pytest.fixture(scope="module")
def loaded():
    return {process: policies.load(name) for process, name in POLICIES.items()}


@pytest.fixture
def trained(loaded, request):
    """(learner, rollout) of a LoRA that is not at its start, by the transition that is asked for."""
    transition = TRANSITIONS[request.param]
    policy = loaded[transition.process]
    adapter = Adapter(policy, LoraSettings(4, 4.0, next(iter(policy.lora_targets))))
    try:
        adapter.load({name: torch.randn(p.shape, generator=generator("live", name)) * 0.05 for name, p in adapter.parameters.items()})
        learner = Learner(policy, adapter.parameters, OptimizerSettings(), "run")
        plan = SamplingPlan(policy.time_grid(STEPS, 3.0, SIZE), transition.name, 0.7, 1.0, SIZE)
        asked = Request(PROMPTS, 2, policy.latent_shape(SIZE), seed=1, iteration=0, micro_batch=4)
        yield learner, sample(policy, asked, encode(policy, PROMPTS, SIZE), plan, learner.version)
    finally:
        adapter.remove()


@pytest.mark.parametrize("trained", [t.name for t in TRANSITIONS.values() if t.stochastic], indirect=True)
def test_replay_gives_the_ratio_one_exactly(trained, one_thread):
    learner, rollout = trained
    scores = Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),))
    stats = update(learner, combine(scores), UpdateSettings(train_fraction=1.0))
    assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0 and stats.transitions == rollout.size * (STEPS - 1)
