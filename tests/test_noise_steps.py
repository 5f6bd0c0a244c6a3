"""Which steps have noise: all, a window, or one where a group branches; what a group has in common is one row of a denoiser call."""

import dataclasses
import itertools

import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.forward import timetable
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise_steps import NoiseSteps
from comfy_dancegrpo.grpo.pairs import shares
from comfy_dancegrpo.grpo.protocol import Column, Scores, SamplingPlan, Size
from comfy_dancegrpo.grpo.rollout import Request, Work, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.runs.prompt_cache import encode

PROMPTS, SIZE, GROUP, STEPS = ("a large red circle in the center on a white background", "a small blue star", "a green ring"), Size(64, 64), 4, 5
EVERY = UpdateSettings(clip_range=1e-3, train_fraction=1.0, max_grad_norm=1e9)
MODES = (NoiseSteps(), NoiseSteps("window", 2), NoiseSteps("window", 2, share=0.5), NoiseSteps("branch"))


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded")


@pytest.fixture
def learner(policy):
    adapter = Adapter(policy, LoraSettings(2, 2.0, "attention"))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters.values():
            p += 0.1 * torch.randn_like(p)
    yield Learner(policy, adapter.parameters, OptimizerSettings(learning_rate=1e-3), "run")
    adapter.remove()


def rolled(learner, noise_steps, shared=True, micro_batch=4, eta=0.7, iteration=0):
    policy = learner.policy
    plan = SamplingPlan(policy.time_grid(STEPS, 3.0, SIZE), "dance_sde", eta, 3.5, SIZE)
    request = Request(PROMPTS, GROUP, policy.latent_shape(SIZE), 1, iteration, shared, micro_batch, noise_steps)
    return sample(policy, request, encode(policy, PROMPTS, SIZE), plan, learner.version)


def scored(rollout):
    return combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size)) ** 1.5),)))


def test_every_step_has_noise():
    assert NoiseSteps().of(3, 5, 0, 0).all()


def test_a_branch_is_one_step_of_each_group_drawn_anew():
    found = [NoiseSteps("branch").of(200, 6, seed=0, iteration=iteration) for iteration in (0, 1)]
    assert all(bool((noisy.sum(1) == 1).all()) and not noisy[:, -1].any() for noisy in found)  # never the last
    assert all(20 < count < 60 for noisy in found for count in noisy[:, :-1].sum(0).tolist())  # of 40 expected
    assert not torch.equal(*found) and torch.equal(found[0], NoiseSteps("branch").of(200, 6, 0, 0))
    assert NoiseSteps("branch", share=0.4).of(200, 6, 0, 0).any(0).tolist() == [True, True, False, False, False, False]


def test_a_window_moves_on_or_is_drawn():
    places = [NoiseSteps("window", 2, interval=3).of(2, 6, 0, iteration)[0].nonzero()[:, 0].tolist() for iteration in range(15)]
    assert [place for place, _ in itertools.groupby(places)] == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 1]] and places[:3] == [[0, 1]] * 3
    drawn = [NoiseSteps("window", 2).of(3, 6, 0, iteration) for iteration in range(60)]
    assert all(torch.equal(noisy, noisy[:1].expand(3, -1)) for noisy in drawn)  # one for all groups
    assert {noisy[0].int().argmax().item() for noisy in drawn} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="found 6 steps, accepted: up to 5"):
        NoiseSteps("window", 6).of(1, 6, 0, 0)


def test_a_timetable_has_every_step_of_every_row_once_and_no_row_twice_in_a_call():
    ways = [range(2, 5), range(0, 5), range(4, 5), range(3, 3), range(1, 5)]
    for size in (1, 2, 3, 10):
        table = timetable(ways, size)
        assert sorted(itertools.chain(*table)) == [(row, t) for row, way in enumerate(ways) for t in way]
        assert all(0 < len(call) <= size and len({row for row, _ in call}) == len(call) for call in table)
        assert all([t for call in table for row, t in call if row == k] == list(way) for k, way in enumerate(ways))
    assert list(map(len, timetable(ways, 2))) == [2, 2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("noise_steps", MODES, ids=str)
def test_what_a_group_has_in_common_is_as_if_each_sample_had_been_computed_alone(learner, noise_steps, one_thread):
    """Against the samples one by one, each with the noise that the rollout gave it."""
    rollout, policy = rolled(learner, noise_steps), learner.policy
    levels, plan = rollout.plan.grid.levels.double(), rollout.plan
    assert torch.equal(rollout.noisy, noise_steps.of(len(PROMPTS), STEPS, 1, 0))
    for n in range(rollout.size):
        group = int(rollout.groups[n])
        for t in range(STEPS - 1):
            x, x_next = rollout.states[n, t].double(), rollout.states[n, t + 1].double()
            with torch.no_grad():
                velocity = policy.predict(rollout.states[n:n + 1, t], plan.grid.timesteps[t:t + 1], rollout.conditioning.rows(rollout.groups[n:n + 1]), plan)[0].double()
            eta, d = 0.7 * bool(rollout.noisy[group, t]), levels[t + 1] - levels[t]
            score = -(x - (1 - levels[t]) * (x - levels[t] * velocity)) / levels[t]**2
            mean = x + velocity * d - eta**2 / 2 * score * d
            if not eta:
                assert (x_next - mean).abs().max() < 1e-5 and rollout.log_probs[n, t] == 0
                continue
            density = torch.distributions.Normal(mean, eta * (-d).sqrt()).log_prob(x_next).mean()
            assert abs(rollout.log_probs[n, t] - density) < 1e-4
            assert 0.8 < ((x_next - mean) / (eta * (-d).sqrt())).std() < 1.2
    for group, common in enumerate(rollout.common.tolist()):
        states = rollout.states[rollout.groups == group]
        assert torch.equal(states[:, :common], states[:1, :common].expand_as(states[:, :common]))
        assert len({state.numpy().tobytes() for state in states[:, common]}) == GROUP


@pytest.mark.parametrize("noise_steps, shared", [*((mode, True) for mode in MODES), *((mode, False) for mode in MODES[:3])], ids=str)
@pytest.mark.parametrize("micro_batch", [4, 5, 1])
def test_ratio_one_and_the_calls_that_the_documentation_names(learner, noise_steps, shared, micro_batch, one_thread):
    rollout = rolled(learner, noise_steps, shared, micro_batch)
    noisy, common = rollout.noisy, rollout.common
    inputs = int((common + GROUP * (STEPS - common)).sum())  # docs/speed.md
    assert rollout.calls.forward - rollout.calls.padded == inputs
    stats = update(learner, scored(rollout), EVERY)
    assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0 and stats.transitions == GROUP * int(noisy[:, :-1].sum())
    trained = sum((1 if t < common[g] else GROUP) for g, t in noisy[:, :-1].nonzero().tolist())
    assert stats.calls.backward - stats.calls.padded == trained


def test_a_branched_group_trains_in_one_call_and_in_one_optimizer_step(learner, one_thread):
    advantages = scored(rolled(learner, NoiseSteps("branch"), micro_batch=1))
    parts = shares(advantages.scores.rollout, advantages.trained, dataclasses.replace(EVERY, optimizer_steps=3))
    assert [len({n // GROUP for n, _ in part}) for part in parts] == [1, 1, 1] and all(len(part) == GROUP for part in parts)
    seen = []
    hook = learner.policy.denoiser.register_forward_hook(lambda *_: seen.append(1))
    update(learner, advantages, EVERY)
    hook.remove()
    assert len(seen) == len(PROMPTS)


@pytest.mark.parametrize("noise_steps", MODES, ids=str)
def test_the_gradient_is_that_of_each_transition_by_itself(learner, noise_steps, one_thread):
    """Sharing against autograd of the plain loss, a (sample, step) pair at a time, in a batch of one."""
    advantages = scored(rolled(learner, noise_steps))
    rollout, policy, plan = advantages.scores.rollout, learner.policy, advantages.scores.rollout.plan
    (pairs,) = shares(rollout, advantages.trained, EVERY)
    found = {}
    learner.optimizer_step = lambda: found.update({name: p.grad.clone() for name, p in learner.parameters.items()})
    update(learner, advantages, EVERY)
    learner.zero_grad()
    for n, t in pairs:
        x, x_next, level, d = rollout.states[n:n + 1, t], rollout.states[n:n + 1, t + 1], plan.grid.levels[t], plan.grid.levels[t + 1] - plan.grid.levels[t]
        velocity = policy.predict(x, plan.grid.timesteps[t:t + 1], rollout.conditioning.rows(rollout.groups[n:n + 1]), plan)
        mean = x + velocity * d + plan.eta**2 / 2 * (x + (1 - level) * velocity) / level * d  # the score is -(x + (1 - sigma) v) / sigma
        density = torch.distributions.Normal(mean, plan.eta * (-d).sqrt()).log_prob(x_next).mean()
        (-advantages.values[n] * torch.exp(density - density.detach()) / len(pairs)).backward()  # the clip plays no part where the ratio is one
    wanted = torch.cat([p.grad.flatten() for p in learner.parameters.values()])
    assert ((torch.cat([g.flatten() for g in found.values()]) - wanted).norm() / wanted.norm()).item() < 1e-5


def test_processes_take_whole_groups_where_they_can(monkeypatch):
    from comfy_dancegrpo import processes

    def places(prompts, count, mode):
        request = Request(prompts, GROUP, (1,), seed=0, iteration=0, noise_steps=NoiseSteps(mode))
        levels = torch.linspace(1, 0, STEPS + 1)
        plan = SamplingPlan(type("Grid", (), {"levels": levels, "steps": STEPS})(), "dance_sde", 0.7)
        monkeypatch.setattr(processes, "count", lambda: count)
        found = []
        for rank in range(count):
            monkeypatch.setattr(processes, "rank", lambda: rank)
            found.append(Work(request, plan).places.tolist())
        assert sorted(itertools.chain(*found)) == list(range(len(prompts) * GROUP))
        return found

    whole = places(tuple("abcd"), 2, "branch")
    assert [len(own) for own in whole] == [8, 8] and all(len({n // GROUP for n in own}) == 2 for own in whole)
    assert [len(own) for own in places(tuple("abc"), 2, "branch")] == [6, 6]
    spread = places(tuple("abcd"), 2, "all")
    assert [len(own) for own in spread] == [8, 8] and any(len({n // GROUP for n in own}) > 2 for own in spread)


def test_group_sample_refuses_what_cannot_branch(policy):
    from comfy_dancegrpo.nodes.group_sample import GroupSample

    live = type("Live", (), {"policy": policy, "settings": None})()
    with pytest.raises(RunError, match="input \"initial_noise\": found 'independent', accepted where \"noise_steps\" is 'branch': 'shared'"):
        GroupSample().sample(live, None, 4, 5, "dance_sde", 0.7, 3.0, 3.5, 64, 64, "independent", noise_steps="branch")
