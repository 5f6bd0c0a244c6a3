"""Each objective against its paper's equation in float64, and the gradient of the whole update by it against finite differences of that."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from perceptron import ALL, PAIRS, STEPS, Perceptron, case, flat, numpy_log_prob, numpy_steps, relative_error, slope, with_reference

from comfy_dancegrpo.grpo.objectives import OBJECTIVES
from comfy_dancegrpo.grpo.objectives.kl import kl
from comfy_dancegrpo.grpo.objectives.steps import Steps
from comfy_dancegrpo.grpo.pairs import shares
from comfy_dancegrpo.grpo.update import update

CHOICES = {
    "symmetric": {}, "higher": {"clip_range_high": 4e-3}, "guard": {"objective": "grpo_guard", "clip_range": 2.5e-4}, "reinforce": {"objective": "reinforce"},
    "symmetric, KL": {"kl_weight": 0.8}, "guard, KL": {"objective": "grpo_guard", "clip_range": 2.5e-4, "kl_weight": 3.0},
    "reinforce, KL": {"objective": "reinforce", "kl_weight": 0.5},  # DPOK
}


def drawn(shape, seed):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def steps_of(drift=0.02, std=0.3):
    """Five transitions of a policy that has moved since it drew them."""
    mean_old, noise, moved = (drawn((5, 4, 3), seed) for seed in range(3))
    mean, std = mean_old + drift * moved, torch.full((5, 1, 1), std, dtype=torch.float64)
    x_next = mean_old + std * noise
    log_probs = [torch.distributions.Normal(of, std).log_prob(x_next).mean((1, 2)) for of in (mean, mean_old)]
    return Steps(*log_probs, torch.tensor([2.0, -1.0, 0.5, -0.3, 1.5], dtype=torch.float64), mean, std, torch.full((5,), 0.1, dtype=torch.float64), mean_old), noise


# -- the equations ----------------------------------------------------------------------------------------------------------------
def test_the_clip_holds_where_the_ratio_has_moved_the_way_that_the_advantage_asks_for():
    """By hand, for A 1, 1, -1, -1 and rho 1.3, 0.6, 1.3, 0.6, within 0.8 to 1.2, and within 0.8 to 1.28 as DAPO has it."""
    rho, a = torch.tensor([1.3, 0.6, 1.3, 0.6]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    steps = Steps(rho.log(), torch.zeros(4), a, torch.zeros(4, 1), torch.ones(4, 1), torch.ones(4))
    for high, first in ((0.2, -1.2), (0.28, -1.28)):
        loss, outside = OBJECTIVES["clipped"].losses(steps, 0.2, high)
        torch.testing.assert_close(loss, torch.tensor([first, -0.6, 1.3, 0.8]))
        assert outside.tolist() == [True] * 4
    assert OBJECTIVES["clipped"].losses(steps, 0.2, 0.4)[1].tolist() == [False, True, False, True]


def test_the_normalised_ratio_is_the_drift_along_the_noise():
    """arXiv 2510.22319: with the mean of the log-ratio taken out and its spread divided by, what is left is mean(noise (mean - mean_old))."""
    steps, noise = steps_of()
    rho = np.exp((noise * (steps.mean - steps.mean_old)).mean((1, 2)).numpy())
    a = steps.advantages.numpy()
    loss, outside = OBJECTIVES["grpo_guard"].losses(steps, 4e-3, 4e-3)
    np.testing.assert_allclose(loss, np.maximum(-a * rho, -a * np.clip(rho, 0.996, 1.004)) / 0.1, rtol=1e-12)
    assert outside.tolist() == (np.abs(rho - 1) > 4e-3).tolist() and 0 < outside.sum() < 5


def test_the_normalised_ratio_is_centred_at_one_and_the_plain_one_is_not():
    """Of many draws by a policy that has moved the log-ratios of the plain one have the mean -KL."""
    source = np.random.default_rng(4)
    drift, std, noise = 0.05, 0.1, source.standard_normal((4000, 8))
    mean_old, mean = torch.zeros(4000, 8, dtype=torch.float64), torch.full((4000, 8), drift, dtype=torch.float64)
    x_next = torch.tensor(std * noise)
    logs = [torch.distributions.Normal(of, std).log_prob(x_next).mean(1) for of in (mean, mean_old)]
    steps = Steps(*logs, torch.full((4000,), -1.0), mean, torch.full((4000, 1), std, dtype=torch.float64), torch.ones(4000), mean_old)
    plain, normalised = (np.log(OBJECTIVES[name].losses(steps, 1e9, 1e9)[0].numpy()) for name in ("clipped", "grpo_guard"))
    error = 4 * drift / std / math.sqrt(8 * 4000)
    assert abs(plain.mean() + drift**2 / (2 * std**2)) < error and abs(normalised.mean()) < std * error
    assert normalised.std() == pytest.approx(std * plain.std(), rel=1e-9)


def test_kl_is_that_of_two_gaussians():
    steps, _ = steps_of()
    reference = drawn((5, 4, 3), 9)
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(steps.mean, steps.std), torch.distributions.Normal(reference, steps.std))
    torch.testing.assert_close(kl(steps, reference), theirs.mean((1, 2)), rtol=1e-12, atol=0)


def test_kl_pulls_the_policy_to_the_reference():
    steps, reference = steps_of()[0], drawn((5, 4, 3), 9)
    mean = steps.mean.requires_grad_()
    gradient, = torch.autograd.grad(kl(dataclasses.replace(steps, mean=mean), reference).sum(), mean)
    torch.testing.assert_close(gradient, (mean - reference).detach() / (12 * steps.std**2), rtol=1e-12, atol=0)


# -- the whole update -------------------------------------------------------------------------------------------------------------
def numpy_losses(parameters, advantages, pairs, settings, old, reference):
    """Each pair's loss, from the papers' equations; old, reference: parameters of the policy that sampled, and of the reference."""
    rollout = advantages.scores.rollout
    (mean, std, x_next), mean_old, mean_reference = numpy_steps(parameters, rollout, pairs), numpy_steps(old, rollout, pairs)[0], numpy_steps(reference, rollout, pairs)[0]
    a, low = advantages.values.double().numpy()[[n for n, _ in pairs]], settings.clip_range
    high, weight = settings.clip_range_high or low, settings.kl_weight * ((mean - mean_reference) ** 2).mean(1) / (2 * std**2)
    if settings.objective == "reinforce":
        return -a * numpy_log_prob(mean, std, x_next) + weight
    noise = (x_next - mean_old) / std
    guard = settings.objective == "grpo_guard"
    rho = np.exp((noise * (mean - mean_old)).mean(1) if guard else numpy_log_prob(mean, std, x_next) - numpy_log_prob(mean_old, std, x_next))
    surrogate = np.maximum(-a * rho, -a * np.clip(rho, 1 - low, 1 + high))
    assert np.abs(np.abs(rho - 1) - low).min() > 1e-7 and np.abs(rho - 1 - high).min() > 1e-7  # no difference straddles the kink
    return (STEPS * surrogate if guard else surrogate) + weight


@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradient_of_the_whole_update(choice):
    settings = dataclasses.replace(ALL, **CHOICES[choice])
    (learner, advantages), old = case(), flat(Perceptron().net.parameters())
    reference = with_reference(learner)
    stats = update(learner, advantages, settings)

    def losses(at, of=settings):
        return numpy_losses(at, advantages, PAIRS, of, old, reference)
    assert stats.loss == pytest.approx(losses(learner.before[0]).mean(), rel=1e-8)
    assert relative_error(learner.gradients[0], slope(lambda at: losses(at).mean(), learner.before[0])) < 1e-5
    weightless = dataclasses.replace(settings, kl_weight=0.0)
    if settings.kl_weight:
        found = (losses(learner.before[0]) - losses(learner.before[0], weightless)).mean() / settings.kl_weight
        assert stats.reference_kl == pytest.approx(found, rel=1e-8) and found > 1e-4
        # a KL that is computed without a gradient tells the same number, and trains as if there were none
        assert relative_error(learner.gradients[0], slope(lambda at: losses(at, weightless).mean(), learner.before[0])) > 0.05
        assert stats.calls.forward == stats.calls.backward > 0
    else:
        assert stats.reference_kl is None and stats.calls.forward == 0
    if settings.objective != "reinforce":
        assert 0.1 < stats.clip_fraction < 0.95
    else:
        assert stats.clip_fraction == 0.0


@pytest.mark.parametrize("choice", ["guard", "guard, KL"])
def test_later_optimizer_steps_still_know_the_policy_that_sampled(choice):
    settings = dataclasses.replace(ALL, optimizer_steps=3, **CHOICES[choice])
    (learner, advantages), old = case(drift=0.0, learning_rate=1e-4), flat(Perceptron().net.parameters())
    reference = with_reference(learner)
    update(learner, advantages, settings)
    for pairs, before, gradient in zip(shares(advantages.scores.rollout, advantages.trained, settings), learner.before, learner.gradients):
        if (before == old).all():
            continue  # at a ratio of 1 the branches meet, and a difference straddles them
        expected = slope(lambda at: numpy_losses(at, advantages, pairs, settings, old, reference).mean(), before, h=1e-7)
        assert relative_error(gradient, expected) < 1e-4


def test_without_a_reference_there_is_no_kl_to_it():
    learner, advantages = case()
    with pytest.raises(ValueError, match='"kl_weight": found 0.1, accepted here: 0'):
        update(learner, advantages, dataclasses.replace(ALL, kl_weight=0.1))


def test_an_objective_of_flows_is_refused_to_others():
    learner, advantages = case()
    learner.policy.process = "diffusion"
    with pytest.raises(ValueError, match="\"objective\": found 'grpo_guard', accepted for this policy .diffusion.: 'clipped', 'reinforce'"):
        update(learner, advantages, dataclasses.replace(ALL, objective="grpo_guard"))
