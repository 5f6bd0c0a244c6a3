"""A policy that is a multilayer perceptron in float64, a rollout of it, and the same quantities written in numpy.

`numpy_steps` and what follows compute from the rollout's tensors and the parameters alone, with nothing of the library in it.
"""

import contextlib
import math

import numpy as np
import torch
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import Column, Conditioning, SamplingPlan, Scores, Size, TimeGrid
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings

LATENT, WORDS, HIDDEN, STEPS, PROMPTS, GROUP = 6, 9, 16, 5, 3, 4
ETA = 0.5
PAIRS = [(n, t) for n in range(PROMPTS * GROUP) for t in range(STEPS - 1)]
ALL = UpdateSettings(clip_range=1e-3, train_fraction=1.0, max_grad_norm=1e9)


class Perceptron:
    """A flow on latents [B, 6], in layers 16 wide, that are their own picture; see `grpo.protocol.Denoiser`."""

    process = "flow"

    def __init__(self, dtype=torch.float64, seed=0):
        self.net = torch.nn.Sequential(torch.nn.Linear(LATENT + 1 + WORDS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, LATENT))
        self.net.to(dtype)
        source = torch.Generator().manual_seed(seed)
        for p in self.net.parameters():
            p.data = torch.randn(p.shape, generator=source, dtype=torch.float64).to(dtype) * 0.5

    def predict(self, latents, timesteps, conditioning, plan):
        return self.net(torch.cat([latents, timesteps[:, None] / 1000, conditioning.tensors["words"]], 1))

    def decode(self, latents, plan):
        return latents[:, None, :3, None].expand(-1, 1, 3, 3).movedim(2, 3)


class Recorder(Learner):
    """Keeps a copy of the parameters and the gradient that each optimizer step starts from, and the parameters after it."""

    def __init__(self, policy, run="toy", **settings):
        super().__init__(policy, dict(policy.net.named_parameters()),
                         OptimizerSettings(**{"learning_rate": 1e-3, "weight_decay": 0.0, **settings}), run)
        self.before, self.gradients, self.after = [], [], []

    def optimizer_step(self):
        self.before.append(flat(self.parameters.values()))
        self.gradients.append(flat(p.grad for p in self.parameters.values()))
        super().optimizer_step()
        self.after.append(flat(self.parameters.values()))


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double().numpy().copy()


def rollout_of(learner, iteration=0, micro_batch=7, dtype=torch.float64, eta=ETA):
    levels = torch.linspace(1, 0, STEPS + 1, dtype=dtype)
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), eta=eta, size=Size(1, 3))
    words = torch.randn(PROMPTS, WORDS, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    request = Request(tuple("abc"), GROUP, (LATENT,), seed=4, iteration=iteration, micro_batch=micro_batch)
    return sample(learner.policy, request, Conditioning({"words": words}), plan, learner.version)


def advantages_of(rollout, flat_group=None, **settings):
    values = torch.randn(rollout.size, generator=torch.Generator().manual_seed(2))
    if flat_group is not None:
        values[rollout.groups == flat_group] = 0.25
    return combine(Scores(rollout, (Column("toy", 1.0, values),)), **settings)


def drifted(learner, scale=2e-3):
    """Moves the policy away from where its rollout was sampled, so that ratios leave 1 and both branches of the clip are met."""
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in learner.parameters.values():
            p += scale * torch.randn(p.shape, generator=source, dtype=torch.float64).to(p.dtype)


def case(drift=2e-3, flat_group=None, micro_batch=7, **settings):
    learner = Recorder(Perceptron(), **settings)
    advantages = advantages_of(rollout_of(learner, micro_batch=micro_batch), flat_group)
    drifted(learner, drift)
    return learner, advantages


def with_reference(learner, seed=3):
    """The learner with another policy as its reference, and that one's parameters."""
    values = {name: p.detach().clone() for name, p in Perceptron(seed=seed).net.named_parameters()}
    values = {name: learner.parameters[name].detach() + 0.05 * (value - learner.parameters[name].detach()) for name, value in values.items()}

    @contextlib.contextmanager
    def reference():
        own = {name: p.detach().clone() for name, p in learner.parameters.items()}
        for value_of in (values, own):
            with torch.no_grad():
                for name, p in learner.parameters.items():
                    p.copy_(value_of[name])
            if value_of is values:
                yield

    learner.reference = reference
    return flat(values.values())


# -- the independent computation ------------------------------------------------------------------------------------------------
def numpy_network(parameters, rollout, samples, x, sigma):
    """What the perceptron says [B, 6] of x [B, 6], of samples, at sigma [B, 1], in float64."""
    split = np.cumsum([HIDDEN * (LATENT + 1 + WORDS), HIDDEN, LATENT * HIDDEN])
    w1, b1, w2, b2 = np.split(parameters, split)
    words = rollout.conditioning.tensors["words"].double().numpy()[rollout.groups.numpy()[samples]]
    hidden = np.tanh(np.concatenate([x, sigma, words], 1) @ w1.reshape(HIDDEN, -1).T + b1)
    return hidden @ w2.reshape(LATENT, HIDDEN).T + b2


def numpy_steps(parameters, rollout, pairs):
    """(mean, std, what was reached) of the (sample, step) pairs' transitions, in float64."""
    n, t = np.array(pairs).T
    states = rollout.states.double().numpy()
    x, x_next = states[n, t], states[n, t + 1]
    sigma = np.linspace(1, 0, STEPS + 1)[t, None]
    velocity = numpy_network(parameters, rollout, n, x, sigma)
    h, noise = 1 / STEPS, x + (1 - sigma) * velocity  # the score is -noise / sigma
    return x - h * velocity - ETA**2 / 2 * h * noise / sigma, ETA * math.sqrt(h), x_next


def numpy_log_prob(mean, std, x_next):
    return (-((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2).mean(1)


def numpy_pairs(parameters, advantages, pairs, clip_range):
    """(losses, ratios) of the (sample, step) pairs, in float64."""
    rollout = advantages.scores.rollout
    n, t = np.array(pairs).T
    ratio = np.exp(numpy_log_prob(*numpy_steps(parameters, rollout, pairs)) - rollout.log_probs.double().numpy()[n, t])
    a = advantages.values.double().numpy()[n]
    return np.maximum(-a * ratio, -a * np.clip(ratio, 1 - clip_range, 1 + clip_range)), ratio


def finite_difference(parameters, advantages, pairs, clip_range, h=1e-6):
    return slope(lambda at: numpy_pairs(at, advantages, pairs, clip_range)[0].mean(), parameters, h)


def slope(loss, parameters, h=1e-6):
    return np.array([(loss(parameters + h * unit) - loss(parameters - h * unit)) / (2 * h) for unit in np.eye(len(parameters))])


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
