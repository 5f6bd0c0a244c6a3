"""The choices of an algorithm on the embedded policies: whichever is taken, the replay is the rollout bit for bit, and something is learned from it."""

import dataclasses
import functools
import json

import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo import value
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.groups import LEARNED_VALUE
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.objectives import OBJECTIVES
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.transitions import TRANSITIONS
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, bare
from comfy_dancegrpo.runs.prompt_cache import encode
from safetensors.torch import load_file

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
def test_replay_gives_the_ratio_one_exactly(one_thread, trained):
    learner, rollout = trained
    scores = Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),))
    stats = update(learner, combine(scores), UpdateSettings(train_fraction=1.0))
    assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0 and stats.transitions == rollout.size * (STEPS - 1)


@pytest.mark.parametrize("trained", ["flow_grpo_sde", "ddim"], indirect=True)
def test_every_objective_replays_exactly_and_tells_how_far_the_lora_has_gone(one_thread, trained):
    """KL is to the model without the LoRA: more than 0 as it is, and 0 exactly once its B is 0."""
    learner, rollout = trained
    advantages = combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),)))
    learner.reference = functools.partial(bare, learner.policy)
    start = learner.state()
    for objective in OBJECTIVES.values():
        if learner.policy.process not in objective.processes:
            continue
        learner.load_state(start)
        stats = update(learner, advantages, UpdateSettings(train_fraction=1.0, objective=objective.name, kl_weight=0.1))
        assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0 and stats.reference_kl > 1e-6
        assert stats.calls.forward == stats.calls.backward == 12
        assert all(p.requires_grad for p in learner.parameters.values())
    learner.load_state({name: torch.zeros_like(value) if ".lora_B." in name and name.startswith("parameters.") else value for name, value in start.items()})
    untrained = dataclasses.replace(rollout, version=learner.version)
    scores = dataclasses.replace(advantages.scores, rollout=untrained)
    assert update(learner, dataclasses.replace(advantages, scores=scores), UpdateSettings(train_fraction=1.0, kl_weight=0.1)).reference_kl == 0.0


# -- what goes from one iteration to the next -------------------------------------------------------------------------------------
def test_what_an_estimator_remembers_reaches_the_next_rollout_and_a_resumed_run(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """Four iterations on two prompts, at once and in two runs: the same LoRA and the same learned value, and another LoRA than without one."""
    loop_only["4"]["inputs"]["checkpoint_every"] = 1
    prompts, advantage = (next(node for node in loop_only.values() if node["class_type"] == f"DanceGRPO{kind}") for kind in ("PromptSet", "Advantage"))
    prompts["inputs"]["limit"], advantage["inputs"]["estimator"] = 2, LEARNED_VALUE
    words = [saved(loop_only), "--output", tmp_path, *tiny_loop]

    def lora(name, *more):
        done = cli("run", *words, "--run", name, *more)
        assert done.status == 0, done.err
        return load_file(tmp_path / name / "checkpoints" / "0000004.safetensors")

    straight = lora("straight", "--iterations", 4)
    assert cli("run", *words, "--run", "resumed").status == 0  # two
    resumed = lora("resumed", "--iterations", 4, "--set", "Loop Start.on_existing=resume")
    assert straight.keys() == resumed.keys() and "history" in straight
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    monkeypatch.setattr(value, "STEPS", 0)
    forgetful = lora("forgetful", "--iterations", 4)
    assert any(not torch.equal(value, forgetful[name]) for name, value in straight.items() if name.startswith("parameters."))


def test_a_run_without_noise_trains_on_what_it_has_drawn(cli, loop_only, saved, tiny_loop, tmp_path):
    """Two iterations by an ODE; and one line for what cannot be: a group from one noise, an objective that needs probabilities."""
    sampling, training = (next(node for node in loop_only.values() if node["class_type"] == f"DanceGRPO{kind}")["inputs"] for kind in ("GroupSample", "Update"))
    words = ["--output", tmp_path, *tiny_loop]
    sampling["transition"] = "ode"
    assert "'shared', accepted where \"transition\" is 'ode': 'independent'" in cli("run", saved(loop_only), *words, "--run", "shared").err[-1]
    sampling["initial_noise"] = "independent"
    assert "'diffusion_nft', 'awm'" in " ".join(cli("run", saved(loop_only), *words, "--run", "clipped").err)
    training |= {"objective": "diffusion_nft", "optimizer_steps": 2, "nft_beta": 0.1}
    done = cli("run", saved(loop_only), *words, "--run", "forward")
    assert done.status == 0, done.err
    rows = [json.loads(row) for row in (tmp_path / "forward" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and row["ratio_deviation"] == 0 for row in rows)


def test_a_schedule_that_falls_over_the_run_is_told_of_where_the_run_becomes_longer(cli, loop_only, saved, tiny_loop, tmp_path):
    loop_only["4"]["inputs"] |= {"schedule": "linear", "warmup": 0, "learning_rate": 1e-3}
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop]
    first, again = cli(*words), cli(*words, "--iterations", 4, "--set", "Loop Start.on_existing=resume")
    assert (first.status, again.status) == (0, 0)
    line = "the learning rate falls ('linear') over 4 iterations instead of 2"
    assert [line in told for told in first.err].count(True) == 0 and [line in told for told in again.err].count(True) == 1
    rows = [json.loads(row) for row in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])
