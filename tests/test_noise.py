"""Every draw is keyed by what it is for: (seed, iteration, slot, index), never by batches, order or process."""

import dataclasses

import pytest
import torch

from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import Conditioning, SamplingPlan, Size, TimeGrid
from comfy_dancegrpo.grpo.rollout import Request, decoded, initial_noise, sample

REQUEST = Request(("a", "b", "c"), 4, (5,), seed=3, iteration=2)
ROWS = torch.arange(12)


class Still:
    """Predicts no velocity, row by row, so that what a trajectory does is its noise alone."""

    process = "flow"

    def predict(self, latents, timesteps, conditioning, plan):
        return torch.zeros_like(latents)

    def decode(self, latents, plan):
        return latents.clamp(0, 1).view(-1, 1, 1, 5)[..., :3]


def roll(request, eta=0.5, **more):
    levels = torch.linspace(1, 0, 5)
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), eta=eta, size=Size(1, 1))
    return sample(Still(), request, Conditioning({"c": torch.zeros(len(request.prompts), 1)}), plan, ("noise", 0), **more)


def test_keys_do_not_collide_and_repeat_themselves():
    keys = [("initial", s, i, p, n) for s in range(3) for i in range(3) for p in range(3) for n in range(3)]
    keys += [("step", *key[1:]) for key in keys] + [("initial", 11, 1), ("initial", 1, 11), ("initial", "1", 11)]
    first = [torch.randn(8, generator=generator(*key)) for key in keys]
    assert len({tuple(draw.tolist()) for draw in first}) == len(keys)
    assert all(torch.equal(a, torch.randn(8, generator=generator(*key))) for a, key in zip(first, keys))


def test_the_global_state_plays_no_part():
    torch.manual_seed(0)
    first = roll(REQUEST)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first.states, roll(REQUEST).states)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # nor is it moved on


def test_noise_is_standard_normal():
    wide = dataclasses.replace(REQUEST, latent_shape=(4000,), shared_noise=False)
    noise = initial_noise(wide, ROWS).double()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02  # 48000 draws: 4 standard errors are 0.018 and 0.013
    correlation = torch.corrcoef(noise) - torch.eye(12)
    assert correlation.abs().max() < 0.08  # 5 standard errors of 4000 pairs


@pytest.mark.parametrize("micro_batch", [1, 5, 7, 12, 16])
def test_noise_does_not_depend_on_the_micro_batch(micro_batch):
    found, expected = roll(dataclasses.replace(REQUEST, micro_batch=micro_batch)), roll(dataclasses.replace(REQUEST, micro_batch=4))
    for name in ("states", "log_probs", "pictures"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.calls.forward - found.calls.padded == 3 + 12 * 3  # the first step once for each group
    assert found.states.shape == (12, 4, 5) and found.log_probs.shape == (12, 3)


def test_noise_does_not_depend_on_the_other_slots_or_on_the_texts():
    fewer = dataclasses.replace(REQUEST, prompts=("x", "y"), group_size=3)
    kept = [0, 1, 2, 4, 5, 6]  # slots 0 and 1, indices 0 to 2, of the 3 x 4
    assert torch.equal(roll(fewer).states, roll(REQUEST).states[kept])
    assert torch.equal(initial_noise(REQUEST, torch.tensor([7, 2])), initial_noise(REQUEST, ROWS)[[7, 2]])


@pytest.mark.parametrize("change", [{"seed": 4}, {"iteration": 3}])
def test_seed_and_iteration_each_give_other_noise(change):
    other = dataclasses.replace(REQUEST, **change)
    assert not (roll(REQUEST).states == roll(other).states).any()


def test_a_group_shares_its_first_noise_and_no_other():
    shared, own = roll(REQUEST), roll(dataclasses.replace(REQUEST, shared_noise=False))
    first = shared.states[:, 0].view(3, 4, 5)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert len(first[:, 0].unique(dim=0)) == 3
    assert len(own.states[:, 0].unique(dim=0)) == 12 and torch.equal(own.states[::4, 0], first[:, 0])
    for step in (1, 2, 3):  # the noise of the steps is each sample's own
        assert len(shared.states[:, step].unique(dim=0)) == 12


def test_given_latents_take_the_place_of_the_first_noise():
    given = torch.randn(12, 5, generator=generator("test"))
    rollout = roll(dataclasses.replace(REQUEST, micro_batch=5, shared_noise=False), initial=given)
    assert torch.equal(rollout.states[:, 0], given)


def test_without_noise_the_log_probabilities_are_zero():
    rollout = roll(REQUEST, eta=0.0)
    assert not rollout.log_probs.any() and torch.equal(rollout.states[:, -1], rollout.states[:, 0])


def test_small_pictures_are_decoded_together_and_large_ones_alone():
    for size, parts in ((Size(64, 64), [8, 2]), (Size(128, 128), [2] * 5), (Size(512, 512), [1] * 10), (Size(64, 64, 5), [1] * 10)):
        seen, latents = [], torch.arange(10.0)
        plan = SamplingPlan(None, size=size)
        decoder = type("Decoder", (), {"decode": staticmethod(lambda part, plan: seen.append(len(part)) or part)})
        assert torch.equal(decoded(decoder, latents, plan), latents) and seen == parts
