"""The same training with any number of processes (DESIGN, rule 3), on gloo."""

from types import SimpleNamespace

import pytest
import torch
from spmd import distance, in_processes

from comfy_dancegrpo import policies, processes, rewards
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, _sum_gradients, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.nodes.rewards import Score
from comfy_dancegrpo.runs.prompt_cache import encode

SIZE = Size(64, 64)
PROMPTS = ("a red circle", "a blue square", "a small green triangle")
GROUP = 3  # 9 samples: neither 2 nor 4 divides them


def iterations(count, settings, planted=False):
    """Rollouts and gradients of the first iteration, and the LoRA after `count`. planted: the last process keeps its gradient to itself."""
    policy = policies.load("embedded")
    reward = rewards.Reward("brightness", lambda pictures, prompts: torch.stack([p.double().mean().float() for p in pictures]))
    adapter = Adapter(policy, LoraSettings(4, 4.0, "modulation"), 0)
    learner = Learner(policy, adapter.parameters, OptimizerSettings(1e-3, weight_decay=0.0, ema_decay=0.9), "run")
    plan = SamplingPlan(policy.time_grid(4, 3.0, SIZE), "dance_sde", 0.7, 0.0, SIZE)
    found = {}
    clip = learner.clip_grad_norm

    def noted(limit):
        found.setdefault("gradient", {name: p.grad.clone() for name, p in learner.parameters.items()})
        return clip(limit)

    learner.clip_grad_norm = noted
    if planted and processes.rank() == processes.count() - 1 > 0:
        sum_over_all = processes.sum_over_all

        def left_out(tensors):
            tensors = list(tensors)
            for tensor in tensors:
                tensor.zero_()
            sum_over_all(tensors)

        processes.sum_over_all = left_out
    for iteration in range(count):
        request = Request(PROMPTS, GROUP, policy.latent_shape(SIZE), 0, iteration, True, 8)
        rollout = sample(policy, request, encode(policy, PROMPTS, SIZE), plan, learner.version)
        values = processes.gathered(reward(rollout.pictures, rollout.own_prompts), rollout.places, rollout.size)
        if iteration == 0:
            found |= {name: processes.gathered(getattr(rollout, name), rollout.places, rollout.size) for name in ("states", "log_probs", "pictures")}
            found |= {"values": values, "every_picture": rollout.every_picture, "drawn": len(rollout.places)}
        stats = update(learner, combine(Scores(rollout, (Column("brightness", 1.0, values),))), settings)
        found.setdefault("stats", stats)
    found["stats"] = {name: getattr(found["stats"], name) for name in ("loss", "ratio_deviation", "clip_fraction", "grad_norm", "transitions", "calls")}
    found["lora"], found["ema"] = learner.weights(averaged=False), learner.weights()
    found["strayed"] = [learner.strayed()]
    if processes.rank() == processes.count() - 1:
        first, second = (p.data.view(torch.int32).view(-1) for p in list(learner.parameters.values())[:2])
        first[0] += 1  # the least change that there is; and another that makes up for it in the sum
        first[1] -= 1
        second[0] += 1
    found["strayed"].append(learner.strayed())
    return found


SETTINGS = UpdateSettings(clip_range=1e-3, train_fraction=1.0, optimizer_steps=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return in_processes(1, iterations, tmp_path_factory.mktemp("alone"), 5, SETTINGS)[0]


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_trains_alike(count, alone, tmp_path):
    every = in_processes(count, iterations, tmp_path, 5, SETTINGS)
    assert sum(found["drawn"] for found in every) == 9 and {found["drawn"] for found in every} <= {9 // count, -(-9 // count)}
    for rank, found in enumerate(every):
        for name in ("states", "log_probs", "pictures", "values"):
            assert torch.equal(found[name], alone[name]), name
        assert torch.equal(found["every_picture"], alone["pictures"]) if rank == 0 else found["every_picture"] is None
        assert distance(found["gradient"], alone["gradient"]) < 1e-5
        assert distance(found["lora"], alone["lora"]) < 1e-3 and distance(found["ema"], alone["ema"]) < 1e-3
        assert all(torch.equal(found["lora"][name], every[0]["lora"][name]) for name in found["lora"])  # no process drifts from another
        assert found["stats"] == every[0]["stats"] and found["stats"]["ratio_deviation"] == 0.0
        assert found["stats"]["loss"] == pytest.approx(alone["stats"]["loss"], abs=1e-6)
        assert found["strayed"] == [[], [count - 1]]
        assert found["stats"]["transitions"] == alone["stats"]["transitions"]
        calls, calls_alone = found["stats"]["calls"], alone["stats"]["calls"]
        inputs, inputs_alone = (of.forward - of.padded + of.backward for of in (calls, calls_alone))
        assert inputs_alone <= inputs <= found["stats"]["transitions"]  # what a group has in common is computed by each process that has some of it
    print(f"{count} processes: gradient off by {distance(every[0]['gradient'], alone['gradient']):.1e}, LoRA by {distance(every[0]['lora'], alone['lora']):.1e}")


def test_a_gradient_that_is_left_out_would_be_noticed(alone, tmp_path):
    found = in_processes(2, iterations, tmp_path, 5, SETTINGS, True)[0]
    off = distance(found["gradient"], alone["gradient"]), distance(found["lora"], alone["lora"])
    print(f"one process's gradient left out: gradient off by {off[0]:.1e}, LoRA by {off[1]:.1e}")
    assert off[0] > 1e-4 and off[1] > 1e-2


def sparse():
    """Parameters of which every process, the last alone, or none has a gradient, before and after a step with momentum."""
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("every", "last", "none")}
    learner = Learner(None, parameters, OptimizerSettings(0.1, weight_decay=0.1), "run")
    for p in parameters.values():  # of a former step: momentum moves whatever has a gradient, were it zero
        p.grad = torch.ones(2)
    learner.optimizer_step()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name in ("every", *["last"] * (processes.rank() == processes.count() - 1)):
        parameters[name].grad = torch.full((2,), processes.rank() + 1.0)
    _sum_gradients(learner)
    found = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    learner.optimizer_step()
    return found, {name for name, p in parameters.items() if not torch.equal(p, before[name])}


def test_what_no_process_has_a_gradient_of_stays_as_it_is(tmp_path):
    for count, totals in ((1, (1.0, 1.0)), (2, (3.0, 2.0))):
        for found, moved in in_processes(count, sparse, tmp_path):
            assert [found[name].tolist() for name in ("every", "last")] == [[total] * 2 for total in totals] and found["none"] is None
            assert moved == {"every", "last"}


def straight_from_group_sample(frames):
    """The scores of pictures, or videos, that come over Group Sample's own wire: all of them in the first process, None in the others."""
    every = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, frames, 2, 2, 3) / 8
    every = every[:, 0] if frames == 1 else every
    places = torch.tensor(processes.share(list(range(5))))
    rollout = SimpleNamespace(pictures=every[places] * 0, own_prompts=("a",) * len(places), size=5, places=places, prompts=("a",) * 5,
                              plan=SamplingPlan(None, size=Size(2, 2, frames)))
    wire = [None] if not processes.is_first() else [every] if frames == 1 else list(every)
    reward = rewards.Reward("brightness", lambda pictures, prompts: torch.stack([p.mean() for p in pictures]))
    return Score().score(rollout=[rollout], reward=[reward], weight=[1.0], images=wire)[0].columns[0].raw.tolist()


@pytest.mark.parametrize("frames", [1, 2])
def test_pictures_that_the_first_process_alone_has_are_scored_by_all(frames, tmp_path):
    assert in_processes(2, straight_from_group_sample, tmp_path, frames) == [[0.0, 0.125, 0.25, 0.375, 0.5]] * 2
