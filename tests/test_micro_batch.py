"""The micro-batch that is found by trial: the largest that memory suffices for, kept for the run, which is the run with that number typed in."""

import json
import math

import psutil
import pytest
import torch
from perceptron import ETA, LATENT, WORDS, Perceptron, Recorder
from safetensors.torch import load_file
from spmd import in_processes

from comfy_dancegrpo import processes
from comfy_dancegrpo.errors import OutOfMemory
from comfy_dancegrpo.grpo import micro_batch
from comfy_dancegrpo.grpo.noise_steps import NoiseSteps
from comfy_dancegrpo.grpo.protocol import Conditioning, SamplingPlan, Size, TimeGrid
from comfy_dancegrpo.grpo.rollout import Request, Work
from comfy_dancegrpo.policies.base import Policy
from comfy_dancegrpo.runs import checkpoints

NO_MEMORY = "CUDA out of memory. Tried to allocate 1 GiB"


class Scarce(Perceptron):
    """Memory suffices for so many rows of a call; `tried` are those of each."""

    def __init__(self, rows=4096, error=NO_MEMORY):
        super().__init__()
        self.rows, self.error, self.tried, self.denoisers = rows, error, [], {"": self.net}

    def predict(self, latents, timesteps, conditioning, plan):
        self.tried.append(len(latents))
        if len(latents) > self.rows:
            raise RuntimeError(self.error)
        return super().predict(latents, timesteps, conditioning, plan)


def work_of(prompts=3, group=8, noise_steps=NoiseSteps()):
    levels = torch.linspace(1, 0, 6, dtype=torch.float64)
    plan = SamplingPlan(TimeGrid(levels, levels[:-1] * 1000), eta=ETA, size=Size(1, 3))
    words = torch.randn(prompts, WORDS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Work(Request(tuple("abcdefghij"[:prompts]), group, (LATENT,), seed=4, iteration=0, micro_batch=0, noise_steps=noise_steps), plan), Conditioning({"words": words})


def find(policy, **work):
    return micro_batch.find(Recorder(policy), *work_of(**work))


# -- the search ---------------------------------------------------------------------------------------------------------------------
def test_the_sizes_are_the_exact_ones():
    for most in range(1, 70):
        assert micro_batch.sizes(most) == [n for n in range(1, most + 1) if n in (1, 4) or n % 8 == 0]


def test_the_largest_that_fits_is_found_in_few_trials():
    for most in range(1, 200):
        candidates = micro_batch.sizes(most)
        for limit in range(most + 1):
            tried = []
            size, too_many = micro_batch.largest(candidates, lambda n: tried.append(n) or n <= limit)
            assert size == max((n for n in candidates if n <= limit), default=0)
            assert too_many == next((n for n in candidates if n > limit), 0)
            assert len(tried) == len(set(tried)) <= 2 * math.log2(len(candidates)) + 2


@pytest.mark.parametrize("rows, found", [(4096, (24, 0)), (24, (24, 0)), (23, (16, 24)), (7, (4, 8)), (1, (1, 4))])
def test_a_policy_that_runs_out_of_memory(rows, found):
    assert find(Scarce(rows)) == found


def test_not_even_one_row_is_one_line_and_another_error_is_told():
    with pytest.raises(OutOfMemory, match="^memory does not suffice to train on one sample at a time; accepted: "):
        find(Scarce(0))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find(Scarce(4, "mat1 and mat2 shapes cannot be multiplied"))


def test_nothing_changes_by_it():
    learner = Recorder(Scarce(8), ema_decay=0.9)
    before, drawn = learner.state(), torch.get_rng_state()
    assert micro_batch.find(learner, *work_of()).size == 8 and max(learner.policy.tried) == 24
    after = learner.state()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(drawn, torch.get_rng_state()) and all(p.grad is None for p in learner.parameters.values())


def test_no_more_rows_than_a_process_has_use_for(monkeypatch):
    """Of a branching group one input is trained, so its replay has as many rows as there are groups."""
    assert find(Scarce()).size == 24 and find(Scarce(), prompts=1, group=7).size == 4
    assert find(Scarce(), prompts=10, noise_steps=NoiseSteps("branch")).size == 8
    assert find(Scarce(), prompts=10).size == micro_batch.ON_CPU


def test_main_memory_is_not_filled(monkeypatch):
    """What a row keeps for its backward pass is counted, and is not the weights."""
    def rows(available):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
        return micro_batch._in_main_memory(Recorder(Scarce()), *work_of())

    of_a_row = 10**9 // rows(micro_batch.MAIN_MEMORY * 10**9)
    hidden, inputs = 16 * 8, (LATENT + 1 + WORDS) * 8  # float64
    assert hidden + inputs <= of_a_row <= hidden + inputs + 1024 < sum(p.numel() * 8 for p in Perceptron().net.parameters())
    assert rows(0) == 1 and find(Scarce()).size == 1
    assert rows(micro_batch.MAIN_MEMORY * (of_a_row * 9 + 8)) == 9 and find(Scarce()).size == 8


def of_rank():
    """In each of two processes, of which the second has less memory."""
    policy = Scarce(4096 if processes.is_first() else 8)
    return find(policy, prompts=8), policy.tried


def test_processes_agree_on_what_fits_in_all(tmp_path):
    (first, tried), (second, tried_there) = in_processes(2, of_rank, tmp_path)
    assert first == second == (8, 16) and tried == tried_there


def test_processes_that_share_a_sample_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "sharded", lambda: True)
    assert micro_batch.problem(4) is None
    assert micro_batch.problem(0).startswith('input "micro_batch": found 0, accepted where processes share the weights')


# -- a run -----------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def flow(loop_only, saved, tiny_loop):
    """The words of a short run of 6 samples, of which 4 or 1 fit into a call."""
    return ["run", saved(loop_only), *tiny_loop, "--set", "Loop Start.checkpoint_every=1"]


def lora(output):
    return load_file(output / "quickstart" / "lora" / "quickstart.safetensors")


def rows_of(output):
    lines = (output / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "time")} for line in lines]


def equal(a, b):
    return rows_of(a) == rows_of(b) and lora(a).keys() == lora(b).keys() and all(torch.equal(value, lora(b)[name]) for name, value in lora(a).items())


def told(done):
    assert done.status == 0, done.err
    return [line for line in done.err if "found by trial" in line]


def test_it_is_the_run_with_that_number_typed_in_and_resumes_with_it(cli, flow, tmp_path, monkeypatch):
    by_trial, output = ["--set", "Loop Start.micro_batch=0"], tmp_path / "found"
    predict, limit = Policy.predict, [3]

    def scarce(self, x, *arguments):
        if len(x) > limit[0]:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return predict(self, x, *arguments)

    monkeypatch.setattr(Policy, "predict", scarce)
    (line,) = told(cli(*flow, *by_trial, "--iterations", 1, "--output", output))
    assert "micro-batch 1, found by trial (4 did not fit into memory); this run keeps it" in line
    assert checkpoints.newest(output / "quickstart/checkpoints").micro_batch == 1
    limit[0] = 4096
    (output / "quickstart/lora/quickstart.safetensors").unlink()
    assert not told(cli(*flow, *by_trial, "--resume", "--output", output))  # though more would fit by now
    assert not told(cli(*flow, "--set", "Loop Start.micro_batch=1", "--output", tmp_path / "typed"))
    assert equal(output, tmp_path / "typed")
    record = output / "quickstart/run.json"
    before = record.read_text(encoding="utf-8")
    assert any("finished and unchanged" in line for line in cli(*flow, *by_trial, "--output", output).err) and record.read_text(encoding="utf-8") == before
    (line,) = told(cli(*flow, *by_trial, "--output", tmp_path / "more"))
    assert "micro-batch 4, found by trial (more are of no use here)" in line
    assert not told(cli(*flow, "--output", tmp_path / "default")) and equal(tmp_path / "more", tmp_path / "default")


def test_memory_that_runs_out_later_halves_it(cli, flow, tmp_path, monkeypatch):
    predict, calls = Policy.predict, []

    def scarce(self, x, *arguments):
        calls.append(len(x))
        if len(calls) > 12 and len(x) > 2:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return predict(self, x, *arguments)

    monkeypatch.setattr(Policy, "predict", scarce)
    done = cli(*flow, "--set", "Loop Start.micro_batch=0", "--set", "Loop Start.on_out_of_memory=halve", "--output", tmp_path)
    assert len(told(done)) == 1 and any("it goes on with 2 instead of 4" in line for line in done.err)
    assert checkpoints.newest(tmp_path / "quickstart/checkpoints").micro_batch == 2


def test_the_estimate_of_memory_says_what_it_counts(cli, flow):
    done = cli("validate", flow[1], "--memory", "--set", "Loop Start.micro_batch=0")
    assert done.status == 0 and any("0 is found by trial; the activations are those of one sample" in line for line in (*done.out, *done.err))
