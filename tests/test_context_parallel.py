"""Context parallelism: a team of two processes on gloo against one process, for the families that allow it."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from spmd import distance, in_processes

from comfy_dancegrpo import context, policies, processes
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.workflow.host import Host, use

FAMILIES = {"wan-2.1": "wan", "wan-2.2-i2v-a14b": "wan", "flux-dev": "flux", "flux-kontext": "flux_kontext", "flux-2-dev": "flux2"}
SETTINGS = UpdateSettings(clip_range=1e-3, train_fraction=1.0, optimizer_steps=2)


def case_of(name):
    found = importlib.import_module(f"families.{FAMILIES[name]}")
    return next(case for case in found.CASES if case.name == name)


def every(folder, size, names, checkpointing=False):
    """By family: two iterations of three samples a group, in teams of `size`. "line": what is said of a size that cannot be split."""
    torch.accelerator.device_count = lambda: 1  # enable_parallelism divides by it; on the CPU, where nobody else wants teams, it is 0
    host = Host(models=folder)
    host.context_parallel = size
    with use(host):
        return {name: train(case_of(name), checkpointing) for name in names} | {"line": refused() if size > 1 else ""}


def train(case, checkpointing):
    with case.within():
        return _train(case, checkpointing)


def _train(case, checkpointing):
    policy = policies.load(case.name)
    policy.checkpoint_gradients(checkpointing)
    adapter = Adapter(policy, LoraSettings(4, 4.0, case.targets), 0)
    learner = Learner(policy, adapter.parameters, OptimizerSettings(1e-3, weight_decay=0.0), "run")
    plan = SamplingPlan(policy.time_grid(3, 3.0, case.size), "dance_sde", 0.7, case.guidance_scale, case.size)
    found, clip, sum_over_all = {}, learner.clip_grad_norm, processes.sum_over_all

    def summed(tensors):
        tensors = list(tensors)
        if tensors[0].is_floating_point():
            found.setdefault("own", {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None})
        sum_over_all(tensors)

    def noted(limit):
        found.setdefault("gradient", {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None})
        return clip(limit)

    learner.clip_grad_norm, processes.sum_over_all = noted, summed
    for iteration in range(2):
        request = Request(case.prompts[:1], 3, policy.latent_shape(case.size), 0, iteration, False, 2)
        rollout = sample(policy, request, encode(policy, request.prompts, case.size), plan, learner.version)
        values = processes.gathered(rollout.pictures.double().flatten(1).mean(1).float(), rollout.places, rollout.size)
        if iteration == 0:
            found |= {name: processes.gathered(getattr(rollout, name), rollout.places, rollout.size) for name in ("states", "log_probs", "pictures")}
            found["drawn"] = len(rollout.places)
        stats = update(learner, combine(Scores(rollout, (Column("brightness", 1.0, values),))), SETTINGS)
        found.setdefault("stats", {name: getattr(stats, name) for name in ("loss", "ratio_deviation", "grad_norm", "transitions", "calls")})
    processes.sum_over_all = sum_over_all
    return found | {"lora": learner.weights(averaged=False)}


def refused():
    """A video of 9 tokens."""
    size = Size(48, 48)
    policy = policies.load("wan-2.1")
    plan = SamplingPlan(policy.time_grid(2, 3.0, size), "dance_sde", 0.7, 1.0, size)
    request = Request(("a cat",), 1, policy.latent_shape(size), 0, 0, False, 1)
    try:
        sample(policy, request, encode(policy, request.prompts, size), plan, ("run", 0))
    except RunError as error:
        return str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        case_of(name).build().save_pretrained(models / "diffusers" / name)
    return models


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return in_processes(1, every, tmp_path_factory.mktemp("alone"), folder, 1, tuple(FAMILIES))[0]


def test_a_team_of_two_trains_as_one_process(folder, alone, tmp_path):
    for found in in_processes(2, every, tmp_path, folder, 2, tuple(FAMILIES)):
        assert found["line"].startswith("--context-parallel: the tokens of 'wan-2.1' at this size, or those of its text, cannot be divided by 2")
        for name in FAMILIES:
            one, two = alone[name], found[name]
            off = distance(two["gradient"], one["gradient"]), distance(two["lora"], one["lora"]), (two["states"] - one["states"]).abs().max().item()
            print(f"{name}: gradient off by {off[0]:.1e}, LoRA by {off[1]:.1e}, latents by {off[2]:.1e}")
            assert two["drawn"] == 3 and two["stats"]["ratio_deviation"] == 0.0
            assert distance(two["own"], one["gradient"]) > 1e-1  # a part that is left out would be noticed
            assert off[0] < 1e-4 and off[1] < 1e-3 and off[2] < 1e-5  # attention over half of the heads rounds otherwise
            assert {k: two["stats"][k] for k in ("transitions", "calls")} == {k: one["stats"][k] for k in ("transitions", "calls")}
            assert two["stats"]["loss"] == pytest.approx(one["stats"]["loss"], abs=1e-6)


def test_two_teams_of_two(folder, alone, tmp_path):
    """And with gradient checkpointing, in whose second forward passes the teams talk too."""
    for rank, found in enumerate(in_processes(4, every, tmp_path, folder, 2, ("wan-2.1",), True)):
        two, one = found["wan-2.1"], alone["wan-2.1"]
        assert two["drawn"] == (2, 2, 1, 1)[rank] and two["stats"]["ratio_deviation"] == 0.0
        assert distance(two["gradient"], one["gradient"]) < 1e-4 and distance(two["lora"], one["lora"]) < 1e-3
        assert two["stats"]["transitions"] == one["stats"]["transitions"]


# -- what cannot be split ---------------------------------------------------------------------------------------------------------
GPUS = {"none": "are there"}


def denoiser(plan, heads=4):
    return SimpleNamespace(_cp_plan=plan, config=SimpleNamespace(num_attention_heads=heads))


@pytest.mark.parametrize("count, size, sharded, of, said", [
    (4, 3, "", denoiser({}), "--context-parallel: found 3, and the number of processes is 4; accepted: a number that divides theirs"),
    (4, 2, "true", denoiser({}), "--context-parallel: found 2, and accelerate's configuration shards the weights"),
    (1, 2, "", denoiser({}), "--context-parallel: found 2, and the number of processes is 1; accepted: a number that divides theirs"),
    (4, 2, "", denoiser(GPUS), "--context-parallel: found 2, and no GPU that torch"),
    (4, 2, "", denoiser(None), "--context-parallel: found 2, and the tokens of 'model' (SimpleNamespace) cannot be split; accepted: Wan"),
    (4, 4, "", denoiser({}, heads=6), "--context-parallel: found 4, and 'model' has 6 heads of attention; accepted: a number that divides theirs"),
])
def test_what_cannot_be_split(monkeypatch, count, size, sharded, of, said):
    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count if of._cp_plan is not GPUS else 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    host = Host()
    host.context_parallel = size
    with use(host), pytest.raises(RunError, match=re.escape(said)):
        context.split(SimpleNamespace(name="model", context_parallel=True, denoisers={"transformer": of}))
