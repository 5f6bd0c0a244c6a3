"""What changes by the iteration alone: the schedules with numbers or rules of their own against diffusers', and eta and best-of-N over a run that is resumed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfy_dancegrpo.grpo import schedules, update
from comfy_dancegrpo.grpo.advantages import best_of_now
from comfy_dancegrpo.grpo.schedules import between, share
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

REPLAYED = update.update


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


def resumes_as_never_interrupted(cli, words, folder, monkeypatch, iterations):
    """The run "straight" was trained; "killed" in its third iteration and resumed it is the same, bit for bit."""
    left = iter([REPLAYED, REPLAYED])
    monkeypatch.setattr(update, "update", lambda *arguments: next(left)(*arguments))  # the third raises
    assert cli(*words, "--run", "killed", "--iterations", iterations).status == 3
    monkeypatch.setattr(update, "update", REPLAYED)
    assert cli(*words, "--run", "killed", "--iterations", iterations, "--set", "Loop Start.on_existing=resume").status == 0
    one, other = (load_file(folder / name / "checkpoints" / f"{iterations:07}.safetensors") for name in ("straight", "killed"))
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


def test_eta_moves_over_the_run_and_a_resumed_run_has_the_same(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """Four iterations at once and in two runs: the same LoRA; every replay has the eta of its rollout, and a longer run is told of."""
    etas = []
    monkeypatch.setattr(update, "update", lambda learner, advantages, *more: etas.append(advantages.scores.rollout.plan.eta) or REPLAYED(learner, advantages, *more))
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

    resumes_as_never_interrupted(cli, words, tmp_path, monkeypatch, 4)
    for name, status, line in (("Group Sample.eta_end=0", 3, '"eta_end": found 0.0, accepted: above 0, or -1'),
                               ("Loop Start.schedule_rules=1:5", 2, "\"schedule_rules\": found '1:5', accepted: shares")):
        refused = cli(*words, "--run", "refused", "--set", name)
        assert refused.status == status and line in " ".join(refused.verdict), refused
    longer = cli(*words, "--run", "killed", "--iterations", 5, "--set", "Loop Start.on_existing=resume")
    assert longer.status == 0 and sum('"eta_end"' in line and "of 5 iterations instead of 4" in line for line in longer.err) == 1


@pytest.mark.parametrize("size, start, end, length, counts", [
    (12, 0, 4, 5, [0, 10, 8, 6, 4]), (12, 2, 8, 4, [2, 4, 6, 8]), (12, 4, 0, 5, [4, 6, 8, 10, 0]),
    (12, 8, 2, 3, [8, 6, 2]),  # 8, 5, 2: of two that are as near the larger
    (12, 10, 2, 11, [10, 10, 8, 8, 6, 6, 6, 4, 4, 2, 2]),  # 10, 9.2, 8.4, 7.6, 6.8, 6, 5.2, 4.4, 3.6, 2.8, 2
    (5, 0, 2, 4, [0, 4, 4, 2]),  # of an odd group 5, 4, 3, 2
    (5, 2, 0, 4, [2, 4, 4, 0]), (12, 8, 8, 2, [8, 8]), (12, 8, 2, 1, [8]),
])
def test_best_of_moves_to_even_numbers(size, start, end, length, counts):
    """0 is all of the group."""
    groups = torch.arange(2).repeat_interleave(size)
    for iteration, count in enumerate(counts):
        moved = SimpleNamespace(groups=groups, over_the_run=lambda input, one, other: between(one, other, iteration, length))
        assert best_of_now(moved, start, end) == count


def test_best_of_moves_over_the_run_and_a_resumed_run_has_the_same(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """Of 2 groups of 6 over 5 iterations to 2 of each: 6, 5, 4, 3 and 2, so 6, 6, 4, 4 and 2."""
    start = next(node for node in loop_only.values() if node["class_type"] == "DanceGRPOLoopStart")["inputs"]
    start |= {"checkpoint_every": 1}
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--set", "Group Sample.group_size=6", "--set", "Advantage.best_of_end=2"]
    done = cli(*words, "--run", "straight", "--iterations", 5)
    assert done.status == 0, done.err
    rows = [json.loads(row) for row in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["trained_samples"], row["flat_groups"]) for row in rows] == [(12, 0), (12, 0), (8, 0), (8, 0), (4, 0)]
    resumes_as_never_interrupted(cli, words, tmp_path, monkeypatch, 5)
    for name, status, line in (("Advantage.best_of_end=3", 2, '"best_of_end": found 3, accepted: -1 (best_of stays), 0 (all), or an even number up to the size of a group'),
                                ("Advantage.best_of_end=8", 3, '"best_of_end": found 8, accepted: -1 (best_of stays), 0 (all), or an even number up to the 6 of a group'),
                                ("Advantage.best_of=8", 3, '"best_of": found 8, accepted: 0 (all), or an even number up to the 6 of a group')):
        refused = cli(*words, "--run", "refused", "--set", name)
        assert refused.status == status and len(refused.verdict) == 1 and line in refused.verdict[0], refused
    longer = cli(*words, "--run", "killed", "--iterations", 6, "--set", "Loop Start.on_existing=resume")
    assert longer.status == 0 and sum('"best_of_end"' in line and "of 6 iterations instead of 5" in line for line in longer.err) == 1
