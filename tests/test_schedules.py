"""What changes by the iteration alone: the schedules with numbers or rules of their own against diffusers', and eta over a run that is resumed."""

import json

import numpy as np
import pytest
import torch
from comfy_dancegrpo.grpo import schedules
from comfy_dancegrpo.grpo.schedules import between, share
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file


def theirs(name: str, steps: range, rate: float, **options) -> list[float]:
    """diffusers' share of the learning rate at its steps, which count from 0."""
    scheduler = get_scheduler(name, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate), **options)
    return [scheduler.lr_lambdas[0](step) for step in steps]


@pytest.mark.parametrize("warmup, length", [(0, 1), (0, 12), (4, 12), (12, 12), (20, 12)])
@pytest.mark.parametrize("power, rate", [(1.0, 1e-3), (2.0, 3e-7), (0.5, 1.0)])
def test_polynomial_is_that_of_diffusers(warmup, length, power, rate):
    """Its step 0, which has a learning rate of 0 where there is a warm-up, is none of ours. At 3e-7 its end, 1e-7, counts."""
    wanted = theirs("polynomial", range(1, length + 1), rate, num_warmup_steps=max(1, warmup), num_training_steps=length + 1, power=power)
    found = [share("polynomial", iteration, warmup, length, power=power, learning_rate=rate) for iteration in range(1, length + 1)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rules", ["1:3,0.1:5,0.01", "0.5:1,1", "0.25"])
def test_piecewise_constant_is_that_of_diffusers(rules):
    """Which has no warm-up: after ours, an iteration has what its step before has there, so that "1:3" is three iterations."""
    wanted = theirs("piecewise_constant", range(8), 1.0, step_rules=rules)
    assert [share("piecewise_constant", iteration, 0, 8, rules=rules) for iteration in range(1, 9)] == wanted
    assert [share("piecewise_constant", iteration, 4, 8, rules=rules) for iteration in range(1, 9)] == [0.25, 0.5, 0.75, *wanted[3:]]


@pytest.mark.parametrize("rules", ["", "1:", "0:5,1", "1:5", "1:5,0.5:5,1", "1:9,0.5:5,1", "1:x,1", "nan", "1:0,1", "-1", "1,2"])
def test_rules_that_are_none(rules):
    assert f'"schedule_rules": found {rules!r}' in schedules.problem(rules)


def test_between_is_linear_and_has_both_ends():
    np.testing.assert_allclose([between(1.7, 0.3, iteration, 5) for iteration in range(5)], np.linspace(1.7, 0.3, 5), rtol=0, atol=1e-12)
    assert between(1.7, 0.3, 0, 1) == 1.7


def test_eta_moves_over_the_run_and_a_resumed_run_has_the_same(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """Four iterations at once and in two runs: the same LoRA; every replay has the eta of its rollout, and a longer run is told of."""
    from comfy_dancegrpo.grpo import update

    etas, replayed = [], update.update
    monkeypatch.setattr(update, "update", lambda learner, advantages, *more: etas.append(advantages.scores.rollout.plan.eta) or replayed(learner, advantages, *more))
    sample = next(node for node in loop_only.values() if node["class_type"] == "DanceGRPOGroupSample")["inputs"]
    sample |= {"eta": 1.6, "eta_end": 0.4}
    start = next(node for node in loop_only.values() if node["class_type"] == "DanceGRPOLoopStart")["inputs"]
    start |= {"checkpoint_every": 1, "schedule": "polynomial", "schedule_power": 2.0, "warmup": 0, "learning_rate": 1e-3}
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop]
    done = cli(*words, "--run", "straight", "--iterations", 4)
    assert done.status == 0, done.err
    np.testing.assert_allclose(etas, [1.6, 1.2, 0.8, 0.4], rtol=0, atol=1e-12)
    rows = [json.loads(row) for row in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], 1e-7 + (1e-3 - 1e-7) * np.array([1, 0.75, 0.5, 0.25])**2)
    assert [row["ratio_deviation"] for row in rows] == [0.0] * 4

    left = iter([replayed, replayed])
    monkeypatch.setattr(update, "update", lambda *arguments: next(left)(*arguments))  # the third raises
    assert cli(*words, "--run", "killed", "--iterations", 4).status == 3
    monkeypatch.setattr(update, "update", replayed)
    assert cli(*words, "--run", "killed", "--iterations", 4, "--set", "Loop Start.on_existing=resume").status == 0
    one, other = (load_file(tmp_path / name / "checkpoints" / "0000004.safetensors") for name in ("straight", "killed"))
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []
    for name, status, line in (("Group Sample.eta_end=0", 3, '"eta_end": found 0.0, accepted: above 0, or -1'),
                               ("Loop Start.schedule_rules=1:5", 2, "\"schedule_rules\": found '1:5', accepted: shares")):
        refused = cli(*words, "--run", "refused", "--set", name)
        assert refused.status == status and line in " ".join(refused.verdict), refused
    longer = cli(*words, "--run", "killed", "--iterations", 5, "--set", "Loop Start.on_existing=resume")
    assert longer.status == 0 and sum('"eta_end"' in line and "of 5 iterations instead of 4" in line for line in longer.err) == 1
