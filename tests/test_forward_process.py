"""Objectives of the forward process: each against its paper's equation in float64, and the gradient of the whole update by it against finite differences.

The policy is that of tests/support/perceptron.py, as a flow and as a diffusion.
"""

import dataclasses

import numpy as np
import pytest
import torch
from perceptron import (
    ALL, GROUP, LATENT, PAIRS, PROMPTS, STEPS, WORDS, Perceptron, Recorder,
    advantages_of, flat, numpy_network, relative_error, rollout_of, slope, with_reference,
)
from spmd import in_processes

from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.forward_process import Forward
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.objectives import OBJECTIVES
from comfy_dancegrpo.grpo.objectives.draws import Draws
from comfy_dancegrpo.grpo.pairs import shares
from comfy_dancegrpo.grpo.protocol import Column, Conditioning, SamplingPlan, Scores, Size, TimeGrid
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import update

FORWARD = [o.name for o in OBJECTIVES.values() if o.forward]
CHOICES = {
    "nft": {"objective": "diffusion_nft"}, "nft, slow": {"objective": "diffusion_nft", "nft_beta": 0.1},
    "nft, KL": {"objective": "diffusion_nft", "kl_weight": 0.7},
    "awm": {"objective": "awm", "clip_range": 1.0}, "awm, clipped": {"objective": "awm", "clip_range": 2e-3, "clip_range_high": 4e-3},
    "awm, KL": {"objective": "awm", "kl_weight": 0.7},
}
LEVELS = {"flow": np.linspace(1, 0, STEPS + 1), "diffusion": np.array([0.05, 0.2, 0.5, 0.8, 0.95, 1.0])}


def drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


# -- the equations ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("process", ["flow", "diffusion"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_negative_aware_finetuning_as_published(process, beta):
    """Written as the published code writes it, in predictions of x0."""
    x0, eps, said, old = (drawn((6, 4, 3), seed) for seed in range(4))
    level, a = np.array([0.9, 0.7, 0.5, 0.3, 0.2, 0.6])[:, None, None], np.array([1.0, -2.0, 0.0, 5.0, -7.0, 9.0])
    signal, noise = (1 - level, level) if process == "flow" else (np.sqrt(level), np.sqrt(1 - level))
    x, r = signal * x0 + noise * eps, np.clip(np.clip(a, -5, 5) / 5 / 2 + 0.5, 0, 1)

    def square(output):
        predicted = x - level * output if process == "flow" else (x - noise * output) / signal
        return ((predicted - x0) ** 2 / np.abs(predicted - x0).mean((1, 2), keepdims=True)).mean((1, 2))
    expected = 5 * (r * square(beta * said + (1 - beta) * old) + (1 - r) * square((1 + beta) * old - beta * said)) / beta
    target, error = (eps - x0, level) if process == "flow" else (eps, noise / signal)
    draws = Draws(*(torch.tensor(value) for value in (said, old, target, a, noise.ravel(), error.ravel())))
    loss, rho, outside = OBJECTIVES["diffusion_nft"].losses(draws, 0.1, 0.1, beta)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert (rho == 1).all() and not outside.any()


def test_advantage_weighted_matching_as_published():
    """By the published generalised Huber weighting of power 1/4; what it subtracts is the same of both and leaves the ratio."""
    said, target = drawn((6, 4, 3), 0), drawn((6, 4, 3), 1)
    old, a, t = said + 0.1 * drawn((6, 4, 3), 2), np.array([1.0, -1.0, 2.0, -0.5, 1.5, -2.0]), np.linspace(0.2, 1, 6)

    def log_prob(output):
        square = ((output - target) ** 2).mean((1, 2))
        return -((square + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25
    rho = np.exp(log_prob(said) - log_prob(old))
    draws = Draws(*(torch.tensor(value) for value in (said, old, target, a, t, t)))
    loss, found, outside = OBJECTIVES["awm"].losses(draws, 0.01, 0.02, 1.0)
    np.testing.assert_allclose(found, rho, rtol=1e-12)
    np.testing.assert_allclose(loss, np.maximum(-a * rho, -a * np.clip(rho, 0.99, 1.02)), rtol=1e-12)
    assert outside.tolist() == ((rho < 0.99) | (rho > 1.02)).tolist() and 0 < outside.sum() < 6


# -- the whole update -------------------------------------------------------------------------------------------------------------
def rolled(learner, process="flow", transition=None, iteration=0, micro_batch=7):
    """A rollout without noise, from noise of each sample's own: no objective of the reverse process could be trained on it."""
    learner.policy.process = process
    levels = torch.tensor(LEVELS[process])
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), transition or {"flow": "ode", "diffusion": "ddim"}[process], 0.0, size=Size(1, 3))
    words = torch.randn(PROMPTS, WORDS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    request = Request(tuple("abc"), GROUP, (LATENT,), 4, iteration, False, micro_batch)
    return sample(learner.policy, request, Conditioning({"words": words}), plan, learner.version)


def case(process="flow", **settings):
    learner = Recorder(Perceptron(), **settings)
    return learner, advantages_of(rolled(learner, process))


def numpy_noised(rollout, pairs):
    """(x_t, target, signal, noise, what the network is given of the level) of pairs."""
    n, t = np.array(pairs).T
    x0 = rollout.latents.numpy()[n]
    sources = (generator("forward", 4, rollout.iteration, k // GROUP, k % GROUP, step) for k, step in pairs)
    eps = np.stack([torch.randn(LATENT, dtype=torch.float64, generator=source).numpy() for source in sources])
    flow = rollout.plan.transition != "ddim"
    level = LEVELS["flow" if flow else "diffusion"][t, None]
    signal, noise = (1 - level, level) if flow else (np.sqrt(level), np.sqrt(1 - level))
    return signal * x0 + noise * eps, eps - x0 if flow else eps, signal, noise, level


def numpy_losses(advantages, pairs, settings, old, reference):
    """The losses [pairs] as a function of the parameters, and of those where weights are taken that have no gradient; old, reference: the parameters of the
    policy that sampled, and of the reference."""
    rollout = advantages.scores.rollout
    x, target, signal, noise, level = numpy_noised(rollout, pairs)
    a, t = advantages.values.double().numpy()[[n for n, _ in pairs]], noise[:, 0]

    def said(at):
        return numpy_network(at, rollout, [n for n, _ in pairs], x, level)

    def losses(at, around):
        now, then = said(at), said(old)
        pull = settings.kl_weight * ((now - said(reference)) ** 2).mean(1)
        if settings.objective == "awm":
            rho = np.exp(t / 0.25 * ((((then - target) ** 2).mean(1) + 1e-10) ** 0.25 - (((now - target) ** 2).mean(1) + 1e-10) ** 0.25))
            high = settings.clip_range_high or settings.clip_range
            return np.maximum(-a * rho, -a * np.clip(rho, 1 - settings.clip_range, 1 + high)) + pull
        error, r, beta = noise if rollout.plan.transition != "ddim" else noise / signal, a / 10 + 0.5, settings.nft_beta

        def square(sign):
            of, fixed = (error * (then + sign * beta * (what - then) - target) for what in (now, said(around)))
            return (of**2).mean(1) / np.abs(fixed).mean(1)
        return 5 / beta * (r * square(1) + (1 - r) * square(-1)) + pull
    return losses


@pytest.mark.parametrize("process", ["flow", "diffusion"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradient_of_every_optimizer_step_of_the_whole_update(choice, process):
    """At the first the policy is the one that sampled, at the later ones it is not, and each has its own share of the pairs."""
    settings = dataclasses.replace(ALL, optimizer_steps=3, **CHOICES[choice])
    learner, advantages = case(process, learning_rate=3e-3)
    old, reference = flat(learner.parameters.values()), with_reference(learner)
    stats = update(learner, advantages, settings)
    parts = shares(Forward(advantages, settings).rollout, advantages.trained, settings)
    assert sorted(pair for pairs in parts for pair in pairs) == PAIRS and len(learner.gradients) == 3
    means = []
    for pairs, before, gradient in zip(parts, learner.before, learner.gradients):
        losses = numpy_losses(advantages, pairs, settings, old, reference)
        means.append(losses(before, before).mean())
        assert relative_error(gradient, slope(lambda at: losses(at, before).mean(), before, h=1e-7)) < 1e-5
    assert stats.loss == pytest.approx(np.mean(means), rel=1e-9) and stats.ratio_deviation == 0.0
    assert (stats.clip_fraction > 0.2) == (choice == "awm, clipped" or choice == "awm, KL") and (stats.approx_kl > 0) == choice.startswith("awm")
    later = sum(map(len, parts[1:]))  # what the policy that sampled says of them is asked for before it moves
    assert stats.calls.forward + stats.calls.backward - stats.calls.padded == later + len(PAIRS) * (2 if settings.kl_weight else 1)
    assert (stats.reference_kl is None) == (not settings.kl_weight)


@pytest.mark.parametrize("choice", ["nft", "awm"])
def test_the_first_optimizer_step_costs_no_more_than_its_pairs(choice):
    learner, advantages = case()
    settings, ticks = dataclasses.replace(ALL, **CHOICES[choice]), []
    stats = update(learner, advantages, settings, lambda *now: ticks.append(now))
    assert (stats.calls.forward, stats.calls.backward, stats.calls.padded) == (0, 49, 1) and stats.transitions == 48
    assert ticks == [(min(48, 7 * k), 48) for k in range(1, 8)]


@pytest.mark.parametrize("choice", ["nft", "awm, clipped"])
def test_any_micro_batch_gives_the_same(choice):
    gradients = []
    for micro_batch in (48, 16, 7, 5, 1):
        learner, advantages = case(learning_rate=3e-3)
        rollout = dataclasses.replace(advantages.scores.rollout, micro_batch=micro_batch)
        update(learner, dataclasses.replace(advantages, scores=dataclasses.replace(advantages.scores, rollout=rollout)),
               dataclasses.replace(ALL, optimizer_steps=2, **CHOICES[choice]))
        gradients.append(learner.gradients)
    for found in gradients[1:]:
        assert max(map(relative_error, found, gradients[0])) < 1e-9


@pytest.mark.parametrize("objective", FORWARD)
def test_nothing_of_the_trajectory_is_looked_at(objective):
    """With transitions that had noise, and states and log-probabilities that are no numbers, the samples that were decoded alone count."""
    settings = dataclasses.replace(ALL, objective=objective)
    found = []
    for poison in (1.0, float("nan")):
        learner = Recorder(Perceptron())
        rollout = rollout_of(learner)
        rollout = dataclasses.replace(rollout, states=rollout.states * poison, log_probs=rollout.log_probs * poison)
        update(learner, advantages_of(rollout), settings)
        found.append(learner.gradients[0])
        np.testing.assert_allclose(rollout.latents[:, :3].numpy(), rollout.pictures[:, 0, 0].double().numpy(), rtol=1e-6)
    assert np.isfinite(found[1]).all() and (found[0] == found[1]).all()


@pytest.mark.parametrize("fraction, count", [(0.25, 1), (0.6, 2), (1.0, 4)])
def test_as_many_noised_samples_are_trained_as_transitions_would_be(fraction, count):
    learner, advantages = case()
    settings = dataclasses.replace(ALL, train_fraction=fraction, objective="awm")
    assert update(learner, advantages, settings).transitions == count * PROMPTS * GROUP


def test_the_noise_belongs_to_the_sample_and_the_level():
    """Of another order of samples, and of fewer prompts, it is the same; of another iteration it is not."""
    learner, advantages = case()
    rollout = advantages.scores.rollout
    forward, later = (Forward(dataclasses.replace(advantages, scores=dataclasses.replace(advantages.scores, rollout=of)), dataclasses.replace(ALL, objective="awm"))
                      for of in (rollout, dataclasses.replace(rollout, iteration=1)))
    every = {forward.eps(n, t).numpy().tobytes() for n, t in PAIRS} | {later.eps(n, t).numpy().tobytes() for n, t in PAIRS}
    assert len(every) == 2 * len(PAIRS)
    swapped = dataclasses.replace(rollout, groups=rollout.groups.flip(0), indices=rollout.indices.flip(0))
    other = Forward(dataclasses.replace(advantages, scores=dataclasses.replace(advantages.scores, rollout=swapped)), forward.settings)
    assert all(torch.equal(forward.eps(n, t), other.eps(PROMPTS * GROUP - 1 - n, t)) for n, t in PAIRS)


def by_one_of_many():
    """By objective: the samples that are drawn here, the gradients of two optimizer steps, and the calls, of pairs, of all processes."""
    found = {}
    for objective in FORWARD:
        learner, advantages = case(learning_rate=3e-3)
        stats = update(learner, advantages, dataclasses.replace(ALL, objective=objective, optimizer_steps=2, train_fraction=0.6, clip_range=1.0))
        made = stats.calls.forward + stats.calls.backward - stats.calls.padded
        found[objective] = len(advantages.scores.rollout.places), learner.gradients, made, stats.transitions, stats.loss
    return found


def test_any_number_of_processes_gives_the_same(tmp_path):
    """12 samples by 2: noise is of the sample, and what the policy that sampled says of later pairs is asked for by the process that has them."""
    alone, both = by_one_of_many(), in_processes(2, by_one_of_many, tmp_path)
    for objective in FORWARD:
        drawn, gradients, *rest = alone[objective]
        assert drawn == 12 and rest[:2] == [24 + 12, 24]
        for found in both:
            drawn_here, theirs, *their_rest = found[objective]
            assert drawn_here == 6 and their_rest == pytest.approx(rest, rel=1e-12)
            assert max(map(relative_error, theirs, gradients)) < 1e-12


@pytest.mark.parametrize("objective", FORWARD)
def test_a_resumed_run_goes_on_alike(objective):
    settings = dataclasses.replace(ALL, objective=objective, optimizer_steps=2)

    def iterate(learner, iteration):
        update(learner, advantages_of(rolled(learner, iteration=iteration)), settings)
    straight, resumed = Recorder(Perceptron(), ema_decay=0.9), Recorder(Perceptron(seed=1), ema_decay=0.9)
    iterate(straight, 0)
    resumed.load_state(straight.state())
    for learner in (straight, resumed):
        iterate(learner, 1)
    assert all(torch.equal(value, resumed.state()[name]) for name, value in straight.state().items())


@pytest.mark.parametrize("objective", ["clipped", "reinforce"])
def test_what_needs_noise_names_what_needs_none(objective):
    learner, advantages = case()
    with pytest.raises(ValueError, match="no noise.*'diffusion_nft', 'awm'"):
        update(learner, advantages, dataclasses.replace(ALL, objective=objective))


def test_weighted_samples_move_what_is_drawn_towards_the_better_ones():
    """A policy of one weight, which draws N(mean, .) around it: where larger numbers are better it comes to draw larger ones, where smaller, smaller."""
    class Shift:
        process = "flow"

        def __init__(self):
            self.mean = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def predict(self, latents, timesteps, conditioning, plan):
            t = (timesteps / 1000)[:, None]
            return (latents - (1 - t) * self.mean) * (t - 0.25 * (1 - t)) / (t**2 + 0.25 * (1 - t) ** 2) - self.mean  # the velocity of data N(mean, 1/4)

        def decode(self, latents, plan):
            return latents[:, None, None].expand(-1, 1, 1, 3)

    levels = torch.linspace(1, 0, 9, dtype=torch.float64)
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), "ode", 0.0, size=Size(1, 1))
    for objective in FORWARD:
        for sign in (1, -1):
            policy = Shift()
            learner = Learner(policy, {"mean": policy.mean}, OptimizerSettings(0.05, weight_decay=0.0), "toy")
            means = []
            for iteration in range(12):
                rollout = sample(policy, Request(("a",), 32, (1,), 0, iteration, False, 32), Conditioning({"c": torch.zeros(1, 1)}), plan, learner.version)
                means.append(rollout.latents.mean().item())
                advantages = combine(Scores(rollout, (Column("toy", 1.0, sign * rollout.latents[:, 0].float()),)))
                update(learner, advantages, dataclasses.replace(ALL, objective=objective, clip_range=1.0))
            assert sign * (np.mean(means[-3:]) - means[0]) > 0.2
