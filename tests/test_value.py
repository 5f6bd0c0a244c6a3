"""The learned value against finite differences, torch's own Adam, and rewards whose part by the prompt is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfy_dancegrpo.grpo import value
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.groups import LEARNED_VALUE
from comfy_dancegrpo.grpo.protocol import Column, Conditioning, Scores


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(seed=0):
    return 0.3 * draws(value.HIDDEN * (value.FEATURES + 2) + 1, seed=seed)


def test_the_gradient_is_that_of_finite_differences():
    at, z, wanted, h = parameters(), draws(7, value.FEATURES, seed=1), draws(7, seed=2), 1e-6
    found = value.gradient(at, z, wanted)

    def loss(to):
        w1, b1, w2, b2 = np.split(to, np.cumsum([value.HIDDEN * value.FEATURES, value.HIDDEN, value.HIDDEN]))
        f = np.tanh(z.numpy() @ w1.reshape(value.HIDDEN, value.FEATURES).T + b1) @ w2 + b2
        return np.mean((f - wanted.numpy()) ** 2)

    places = [0, 100, value.FEATURES * value.HIDDEN - 1, *range(value.FEATURES * value.HIDDEN, len(at))]  # some of W1, and all of b1, w2 and b2
    for place in places:
        unit = np.eye(1, len(at), place)[0]
        slope = (loss(at.numpy() + h * unit) - loss(at.numpy() - h * unit)) / (2 * h)
        assert found[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_it_is_fitted_as_by_autograd_and_torchs_adam_from_one_iteration_to_the_next():
    first, layer, last = draws(12, value.FEATURES), torch.nn.Linear(value.FEATURES, value.HIDDEN).double(), torch.nn.Linear(value.HIDDEN, 1).double()
    scores = [0.3 + 0.05 * draws(12, seed=seed) for seed in (3, 4)]
    state = value.begun(scores[0], first, seed=5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(state["parameters"], dtype=torch.float64)[:layer.weight.numel()].view_as(layer.weight))
        for p in (layer.bias, last.weight, last.bias):
            p.zero_()
    adam = torch.optim.Adam([*layer.parameters(), *last.parameters()], lr=value.LEARNING_RATE, eps=value.EPSILON)
    mean, spread, centre = scores[0].mean(), scores[0].std(), first.mean(0)
    scale = (first - centre).square().mean().sqrt()

    def theirs(z):
        return mean + spread * last(torch.tanh(layer((z - centre) / scale)))[:, 0]

    assert torch.equal(value.expected(state, first), mean.expand(12))
    for z, seen in zip((first, draws(12, value.FEATURES, seed=6)), scores):
        for _ in range(value.STEPS):
            adam.zero_grad()
            ((theirs(z) - seen) / spread).square().mean().backward()
            adam.step()
        state = json.loads(json.dumps(value.fitted(state, seen, z)))  # as a checkpoint keeps it
        torch.testing.assert_close(value.expected(state, z), theirs(z).detach(), rtol=1e-9, atol=1e-9)


def test_scores_that_differ_by_rounding_lead_to_values_that_do():
    """As with other numbers of processes; two prompts are each other's opposite, so that the gradient by b1 is nothing but rounding."""
    z = draws(2, value.FEATURES).repeat_interleave(2, 0)
    scores = 0.9 + 0.03 * draws(4, seed=1)
    found = []
    for seen in (scores, (scores + 2e-8 * draws(4, seed=2))):
        state = value.fitted(value.begun(seen, z, 0), seen, z)
        found.append(value.fitted(state, seen - 0.5, z))
    near, far = (value.expected(state, draws(50, value.FEATURES, seed=3)) for state in found)
    assert (near - far).abs().max() < 1e-6
    assert np.abs(np.subtract(found[0]["parameters"], found[1]["parameters"])).max() < 1e-5


# -- the features of a prompt -----------------------------------------------------------------------------------------------------
def test_a_prompt_has_its_own_features_whatever_is_beside_it():
    words, pooled, pictures = draws(3, 6, 300).float(), draws(3, 40, seed=1).float(), draws(3, 4, 5, seed=2).float()
    alone = [value.features(Conditioning({"embeds": words[k:k + 1, :length], "pooled": pooled[k:k + 1], "reference": pictures[k:k + 1]}), seed=7)
             for k, length in enumerate((6, 2, 4))]
    padded = words.clone()
    padded[1, 2:], padded[2, 4:] = 0, 0
    together = Conditioning({"embeds": padded, "pooled": pooled, "reference": pictures, "negative.embeds": words, "length": torch.tensor([6, 2, 4])})
    torch.testing.assert_close(value.features(together, seed=7), torch.cat(alone), rtol=0, atol=1e-6)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).float()
    masked = Conditioning({"embeds": words, "pooled": pooled, "reference": pictures, "mask": mask})
    torch.testing.assert_close(value.features(masked, seed=7), torch.cat(alone), rtol=0, atol=1e-6)
    assert not torch.allclose(value.features(together, seed=8), torch.cat(alone), atol=0.1)


def test_features_keep_the_distances_of_embeddings():
    embeds = draws(20, 2000)
    found, wanted = value.features(Conditioning({"pooled": embeds}), seed=1) / value.FEATURES**0.5, embeds / 2000**0.5
    near = torch.pdist(found) / torch.pdist(wanted)
    assert 0.6 < near.min() and near.max() < 1.45 and near.mean().item() == pytest.approx(1, abs=0.05)


# -- as a baseline ----------------------------------------------------------------------------------------------------------------
P, GROUP = 8, 4


def iterations(count, spread_of_prompts, estimator=LEARNED_VALUE):
    """Each iteration's scores and advantages: 8 of 24 prompts, each with a reward of its own that its embedding tells of, and noise of std 0.05."""
    embeds, history, found = draws(24, 5, 96, seed=1).float(), {}, []
    worth = spread_of_prompts * embeds.mean(1).double() @ draws(96, seed=2)
    for iteration in range(count):
        chosen = torch.randperm(24, generator=torch.Generator().manual_seed(iteration))[:P]
        groups = torch.arange(P).repeat_interleave(GROUP)
        rewards = 0.3 + worth[chosen][groups] + 0.05 * draws(P * GROUP, seed=100 + iteration)
        rollout = SimpleNamespace(groups=groups, indices=torch.arange(GROUP).repeat(P), prompts=tuple(str(int(n)) for n in chosen[groups]), history=history,
                                  conditioning=Conditioning({"embeds": embeds[chosen]}), seed=3)
        advantages = combine(Scores(rollout, (Column("r", 1.0, rewards.float()),)), clamp=1000.0, estimator=estimator)
        history = advantages.history
        found.append((rollout, rewards, advantages))
    return found


def share_between(advantages, groups):
    """Of the variance of advantages, that of the groups' means."""
    means = torch.stack([advantages[groups == g].mean() for g in range(P)])
    return (means[groups].square().mean() / advantages.square().mean()).item()


def test_the_part_of_the_reward_that_is_the_prompts_is_taken_out():
    found = iterations(60, spread_of_prompts=0.05)
    shares = [share_between(advantages.values, rollout.groups) for rollout, _, advantages in found]
    assert shares[0] > 0.9  # of noise alone it would be a quarter, since a mean of 4 has that much of its variance
    assert sum(shares[-10:]) / 10 < 0.65
    residuals = [rewards - value.expected(rollout.history["r"], value.features(rollout.conditioning, 3)[rollout.groups]) for rollout, rewards, _ in found[-10:]]
    assert torch.cat(residuals).std().item() < 1.5 * 0.05 and found[0][1].std().item() > 0.15


def test_the_advantage_is_by_the_value_before_it_saw_the_scores():
    for rollout, rewards, advantages in iterations(3, spread_of_prompts=0.05)[1:]:
        residuals = rewards.float().double() - value.expected(rollout.history["r"], value.features(rollout.conditioning, 3)[rollout.groups])
        np.testing.assert_allclose(advantages.values, residuals / residuals.std(), rtol=1e-5, atol=1e-6)
        after = value.expected(advantages.history["r"], value.features(rollout.conditioning, 3)[rollout.groups])
        assert (rewards - after).square().mean() < residuals.square().mean()  # and then it is fitted to them


def test_scores_and_prompts_that_are_all_one_begin_it_without_dividing_by_nothing():
    z = draws(1, value.FEATURES).expand(4, -1)
    state = value.fitted(value.begun(torch.full((4,), 0.1, dtype=torch.float64), z, 0), torch.full((4,), 0.1, dtype=torch.float64), z)
    assert value.expected(state, z) == pytest.approx([0.1] * 4)
