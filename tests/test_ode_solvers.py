"""The multistep solver against the flow of a normal distribution, known in closed form, and against diffusers' own; in rollouts as they are drawn."""

import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise_steps import NoiseSteps
from comfy_dancegrpo.grpo.ode_solvers import DPM_PP_2M, EULER, second_order
from comfy_dancegrpo.grpo.protocol import Column, Conditioning, SamplingPlan, Scores, Size, TimeGrid
from comfy_dancegrpo.grpo.rollout import Request, Work, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.runs.prompt_cache import encode
from diffusers import DPMSolverMultistepScheduler

S, MEANS = 0.5, (0.7, -0.3, 1.5)
FIRST, WINDOW, BRANCH = NoiseSteps("window", 1, share=0.001), NoiseSteps("window", 2), NoiseSteps("branch")  # the first step alone; two; one of each group


class Normal:
    """The flow of data N(m, S^2), m of the prompt: E[x1 - x0 | x], by Bayes' rule. All of it is arithmetic that rounds alike in any batch."""

    process = "flow"

    def predict(self, latents, timesteps, conditioning, plan):
        sigma, m = plan.grid.levels_at(timesteps)[:, None], conditioning.tensors["mean"]
        return -m + (sigma - (1 - sigma) * S**2) / spread(sigma) * (latents - (1 - sigma) * m)

    def decode(self, latents, plan):
        return latents[:, None, :, None].expand(-1, 1, 3, 3).movedim(2, 3)


def spread(sigma):
    return (1 - sigma) * (1 - sigma) * S**2 + sigma * sigma


def solution(x, sigma, sigma_next, m):
    """Of dx = v dsigma: x - (1 - sigma) m keeps its share of the marginal's std."""
    return (1 - sigma_next) * m + (x - (1 - sigma) * m) * (spread(sigma_next) / spread(sigma)) ** 0.5


def drawn(levels, solver, noise_steps=FIRST, micro_batch=4, prompts=3):
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), "dance_sde", 0.5, 1.0, Size(1, 3), solver)
    request = Request(tuple("abc"[:prompts]), 4, (3,), seed=2, iteration=1, micro_batch=micro_batch, noise_steps=noise_steps)
    return sample(Normal(), request, Conditioning({"mean": torch.tensor(MEANS[:prompts], dtype=levels.dtype)[:, None]}), plan, ("toy", 0))


def error(steps, solver):
    """The largest, at any step after the first, which has noise and goes to sigma 0.9; from there to 0.1 sigma is even."""
    rollout = drawn(torch.cat([torch.tensor([0.95]), torch.linspace(0.9, 0.1, steps)]).double(), solver, micro_batch=12)
    sigma, m = rollout.plan.grid.levels[1:-1, None], torch.tensor(MEANS, dtype=torch.float64)[rollout.groups][:, None, None]
    return (rollout.states[:, 1:] - solution(rollout.states[:, 1:2], sigma[:1], sigma, m)).abs().max().item()


@pytest.mark.parametrize("solver, order", [(EULER, 1), (DPM_PP_2M, 2)])
def test_the_error_falls_with_the_order(solver, order):
    errors = [error(steps, solver) for steps in (129, 257, 513)]
    assert errors[0] < 0.1**order
    for before, after in zip(errors, errors[1:]):
        assert before / after == pytest.approx(2**order, rel=0.05)


def test_it_is_that_of_diffusers_on_the_whole_way():
    """From what follows the step with noise on, in float64 on both sides."""
    rollout = drawn(torch.linspace(1, 0, 9).double(), DPM_PP_2M)
    levels = rollout.plan.grid.levels
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(7)
    scheduler.sigmas = levels[1:]
    x, means = rollout.states[:, 1], Conditioning({"mean": torch.tensor(MEANS, dtype=torch.float64)[rollout.groups][:, None]})
    for t, timestep in enumerate(scheduler.timesteps[:-1], start=1):
        velocity = Normal().predict(x, levels[t].expand(len(x)) * 1000, means, rollout.plan)
        x = scheduler.step(velocity, timestep, x).prev_sample
        torch.testing.assert_close(rollout.states[:, t + 1], x, rtol=0, atol=1e-6)  # the scheduler casts the samples to float32
    far = drawn(levels, EULER).states
    assert (far[:, -1] - x).abs().max() > 1e-3


def test_of_diffusion_models_it_is_that_of_diffusers_too():
    scheduler = DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", timestep_spacing="leading")
    scheduler.set_timesteps(6)
    alpha_bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()
    scheduler.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    weights, source = second_order(alpha_bar, "diffusion"), torch.Generator().manual_seed(0)
    x, before = torch.randn(5, generator=source, dtype=torch.float64), None
    for t, timestep in enumerate(scheduler.timesteps):
        epsilon = torch.randn(5, generator=source, dtype=torch.float64)
        a, b = alpha_bar[t], alpha_bar[t + 1]
        x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        expected = scheduler.step(epsilon, timestep, x).prev_sample
        x = b.sqrt() * x0 + (1 - b).sqrt() * epsilon + (0 if before is None else weights[t] * (x0 - before))
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
        before = x0


@pytest.mark.parametrize("noise_steps", [WINDOW, BRANCH], ids=str)
def test_it_does_not_matter_in_which_calls_rows_are_computed_nor_beside_which(noise_steps):
    levels = torch.linspace(1, 0, 8)
    whole = drawn(levels, DPM_PP_2M, noise_steps, micro_batch=4)
    for micro_batch in (1, 3, 5, 32):
        other = drawn(levels, DPM_PP_2M, noise_steps, micro_batch)
        assert torch.equal(whole.states, other.states) and torch.equal(whole.log_probs, other.log_probs) and torch.equal(whole.pictures, other.pictures)
    fewer = drawn(levels, DPM_PP_2M, noise_steps, micro_batch=4, prompts=2)
    assert torch.equal(whole.states[:8], fewer.states) and torch.equal(whole.pictures[:8], fewer.pictures)
    euler = drawn(levels, EULER, noise_steps)
    last = [int(noisy.nonzero()[-1]) for noisy in whole.noisy]
    for n, group in enumerate(whole.groups.tolist()):
        same = last[group] + 3  # the states up to the noise, what it led to, and a step of order 1
        assert torch.equal(whole.states[n, :same], euler.states[n, :same])
        assert all(not torch.equal(*pair) for pair in zip(whole.states[n, same:], euler.states[n, same:]))


def test_noise_in_all_steps_leaves_nothing_to_it():
    levels = torch.linspace(1, 0, 8)
    assert torch.equal(drawn(levels, DPM_PP_2M, NoiseSteps()).states, drawn(levels, EULER, NoiseSteps()).states)
    still = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), "dance_sde", 0.0, 1.0, Size(1, 3), DPM_PP_2M)
    assert not Work(Request(("a",), 2, (3,), 0, 0, noise_steps=BRANCH), still).second_order.any()


@pytest.mark.parametrize("name, transition, noise_steps", [
    ("embedded", "dance_sde", NoiseSteps("window", 2, share=0.5)), ("embedded", "dance_sde", NoiseSteps("branch", share=0.5)),
    ("embedded_diffusion", "ddim", NoiseSteps("branch", share=0.5)),
], ids=str)
def test_the_ratio_stays_one(name, transition, noise_steps, one_thread):
    policy, prompts, size = policies.load(name), ("a large red circle in the center on a white background", "a small blue star"), Size(64, 64)
    adapter = Adapter(policy, LoraSettings(2, 2.0, next(iter(policy.lora_targets))))
    try:
        learner = Learner(policy, adapter.parameters, OptimizerSettings(), "run")
        plan = SamplingPlan(policy.time_grid(5, 3.0, size), transition, 0.7, 1.0, size, DPM_PP_2M)
        request = Request(prompts, 2, policy.latent_shape(size), 1, 0, micro_batch=4, noise_steps=noise_steps)
        assert Work(request, plan).second_order.any(1).all()
        rollout = sample(policy, request, encode(policy, prompts, size), plan, learner.version)
        stats = update(learner, combine(Scores(rollout, (Column("toy", 1.0, torch.arange(4.0) ** 1.5),))), UpdateSettings(train_fraction=1.0))
        assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0 and stats.transitions == 2 * rollout.noisy.sum()
    finally:
        adapter.remove()
