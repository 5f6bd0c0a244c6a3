"""Sharded weights (FSDP2): 2 processes on gloo against 1, full fine-tuning and a LoRA on a sharded base."""

import importlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from spmd import distance, in_processes

from comfy_dancegrpo import policies, processes, sharding
from comfy_dancegrpo.errors import Interrupted, WorkflowError
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import Advantages, Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import LoraSettings, applied, bare
from comfy_dancegrpo.lora.full import FullSettings
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.workflow.host import Host, use

SIZE, GROUP, MICRO_BATCH, ITERATIONS, SAVED = Size(64, 64), 5, 2, 5, 3  # 5 samples in twos: 2 calls in the one process, 1 in the other
UPDATE = UpdateSettings(clip_range=1e-3, train_fraction=1.0, optimizer_steps=2)
CASES = {"full": (FullSettings(), "float32", False), "full in bfloat16": (FullSettings(), "bfloat16", True),  # dtype, gradient checkpointing
         "lora": (LoraSettings(4, 4.0, "modulation"), "float32", False)}
PLANTED = {"mean": 1, "left out": ITERATIONS}  # how many iterations each fault is trained with


def train(settings, dtype, recompute, checkpoint=None, planted=""):
    """A short training, on from a checkpoint where one is given. planted: torch's own mean of the gradients in place of the sum, or the gradient of the
    last process left out."""
    policy, iterations = policies.load("embedded", dtype), PLANTED.get(planted, ITERATIONS)
    policy.checkpoint_gradients(recompute)
    named = dict(policy.denoiser.named_parameters())
    base = {name: sharding.own(p).clone() for name, p in named.items()}
    found = {"parts": sum(map(sharding.is_part, named.values())), "held": sum(p.numel() for p in base.values())}
    if planted == "left out" and processes.rank() == processes.count() - 1:
        objective = importlib.import_module("comfy_dancegrpo.grpo.objectives.clipped")
        clipped = objective.clipped
        objective.clipped = lambda *given: (lambda loss, outside: (loss * 0, outside))(*clipped(*given))
    if planted == "mean":
        for module in policy.denoiser.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(float(processes.count()))
    plan = SamplingPlan(policy.time_grid(4, 3.0, SIZE), "dance_sde", 0.7, 0.0, SIZE)
    attached = settings.attach(policy, 0)
    found["start"] = {f"parameters.{name}": sharding.whole(p) for name, p in attached.parameters.items()}
    learner = Learner(policy, attached.parameters, OptimizerSettings(1e-3, weight_decay=0.0, ema_decay=0.9), "run", attached.written)
    if checkpoint:
        learner.load_state(load_file(checkpoint) if processes.is_first() else {})
    clip = learner.clip_grad_norm

    def noted(limit):
        gradient = {name: sharding.whole(p.grad) for name, p in learner.parameters.items()}
        found.setdefault("gradient", gradient)
        return clip(limit)

    def draw(iteration, group=GROUP):
        request = Request(("a red circle",), group, policy.latent_shape(SIZE), 0, iteration, True, MICRO_BATCH)
        return sample(policy, request, encode(policy, request.prompts, SIZE), plan, learner.version)

    def step(iteration):
        rollout = draw(iteration)
        pictures = processes.gathered(rollout.pictures, rollout.places, rollout.size)
        found.setdefault("pictures", pictures)
        return rollout, update(learner, combine(Scores(rollout, (Column("brightness", 1.0, pictures.double().mean((1, 2, 3)).float()),))), UPDATE)

    learner.clip_grad_norm = noted
    for iteration in range(learner.version[1], iterations):
        rollout, stats = step(iteration)
        found |= {"deviation": max(stats.ratio_deviation, found.get("deviation", 0.0)), "norm": stats.grad_norm, "calls": stats.calls + rollout.calls}
        found[f"state {iteration + 1}"] = learner.state()
    snapshot = attached.snapshot(learner.result(learner.state()), iterations, True, None, ())
    with bare(policy):
        found["without"] = draw(0).every_picture
    single = draw(learner.version[1], 1)  # one sample: of two processes, one has none
    learner.clip_grad_norm = lambda limit: found.update(single=noted(limit)) or found["single"]
    advantages = Advantages(Scores(single, (Column("toy", 1.0, torch.ones(1)),)), torch.ones(1), torch.tensor([False]), torch.tensor([True]))
    update(learner, advantages, UpdateSettings(train_fraction=1.0))
    found["checked"] = stopped(draw)
    attached.remove()
    found["restored"] = all(torch.equal(sharding.own(p), base[name]) for name, p in policy.denoiser.named_parameters())
    with applied(policy, snapshot):
        found["with"] = draw(0).every_picture
    return found | {"tensors": snapshot.tensors, "digest": snapshot.digest()}


def stopped(draw):
    """How many denoiser calls are begun where the last process is told to stop before its fifth."""
    class Told(Host):
        checked = 0

        def check_interrupt(self):
            self.checked += 1
            if self.checked == 5 and processes.rank() == processes.count() - 1:
                raise Interrupted("stopped")

    with use(Told({})) as host, pytest.raises(Interrupted):
        draw(0)  # more of them here than there: their micro-batches end at other calls
    return host.checked


def sharded(cases, *more):
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    found = {name: train(*case, *more) for name, case in cases.items()}
    return found if more else found | {planted: train(*CASES["full"], None, planted) for planted in PLANTED}


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: train(*case) for name, case in CASES.items()}
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(2, sharded, tmp_path_factory.mktemp("two"), CASES)


def of(state, prefix):
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def changed(found, other):
    """How far the trainings' changes of the weights are apart."""
    return distance(*({name: value - run["start"][name] for name, value in of(run["state 5"], "parameters.").items()} for run in (found, other)))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_of_the_weights_each_train_as_one(name, alone, two):
    one, (first, other) = alone[name], (found[name] for found in two)
    assert one["parts"] == 0 < first["parts"] == other["parts"] and first["held"] + other["held"] == one["held"]
    half = name == "full in bfloat16"  # whose gradients have three digits, and are rounded once a micro-batch
    for found in (first, other):
        assert torch.equal(found["pictures"], one["pictures"]) and found["deviation"] == one["deviation"] == 0.0
        assert found["checked"] == 5 and found["restored"] and found["norm"] == first["norm"]
    off = {"gradient": distance(first["gradient"], one["gradient"])}
    off |= {what: distance(of(first["state 5"], what), of(one["state 5"], what)) for what in ("parameters.", "ema.")} | {"change": changed(first, one)}
    print(f"{name}: off by " + ", ".join(f"{what} {value:.1e}" for what, value in off.items()))
    assert off["gradient"] < (1e-2 if half else 1e-5) and max(off["parameters."], off["ema."]) < (1e-2 if half else 1e-3)
    assert off["change"] < (0.5 if half else 1e-3)  # Adam takes its first steps by the sign alone: noise in half precision
    assert first["single"] == pytest.approx(one["single"], rel=5e-2 if half else 1e-4)
    assert {n: (v.shape, v.dtype) for n, v in first["state 5"].items()} == {n: (v.shape, v.dtype) for n, v in one["state 5"].items()}  # one format
    assert torch.equal(first["without"], one["without"])
    assert (first["with"] - one["with"]).abs().max() < 0.02 < (first["with"] - first["without"]).abs().max()
    assert first["digest"] == other["digest"]
    kept, result = {name for name in other["state 5"] if "." in name}, {name for name in first["state 5"] if name.startswith("ema.")}
    assert kept == (result if name == "lora" else {n for n in kept if n.startswith("optimizer.step.")})  # nobody else holds the whole
    if name != "lora":
        assert len(other["tensors"]) < len(first["tensors"])


@pytest.mark.parametrize("planted", PLANTED)
def test_a_fault_in_the_gradients_would_be_noticed(planted, alone, two):
    """Tenfold the bounds; a mean is half of the sum, of which Adam takes no notice."""
    found, one = two[0][planted], alone["full"]
    off = distance(found["gradient"], one["gradient"]), changed(found, one) if planted == "left out" else None
    print(f"planted, {planted}: off by gradient {off[0]:.1e}, change of the weights {off[1]}")
    assert off[0] > 1e-4 and (off[1] is None or off[1] > 1e-2)


def test_one_process_goes_on_from_the_checkpoint_of_two(alone, two, tmp_path):
    path, whole = tmp_path / "state.safetensors", two[0]["full"]
    save_file(whole[f"state {SAVED}"], path)
    found = train(*CASES["full"], path)
    assert distance(of(found["state 5"], "parameters."), of(whole["state 5"], "parameters.")) < 1e-3


def test_two_processes_go_on_from_the_checkpoint_of_one(alone, tmp_path):
    path, cases = tmp_path / "state.safetensors", {"full in bfloat16": CASES["full in bfloat16"]}
    whole = alone["full in bfloat16"]
    save_file(whole[f"state {SAVED}"], path)
    first = in_processes(2, sharded, tmp_path, cases, path)[0]["full in bfloat16"]
    for prefix in ("parameters.", "ema.", "optimizer.step"):
        assert distance(of(first["state 5"], prefix), of(whole["state 5"], prefix)) < 1e-2


@pytest.mark.parametrize("variable, value, words", [("FSDP_VERSION", "1", "fsdp_version: found 1, accepted: 2"), ("FSDP_OFFLOAD_PARAMS", "true", "accepted: false"),
                                                    ("FSDP_RESHARD_AFTER_FORWARD", "false", "accepted: true")])
def test_another_sharding_is_refused(variable, value, words, monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding.problem() is None
    monkeypatch.setenv(variable, value)
    assert words in sharding.problem()


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(WorkflowError, match="DEEPSPEED.*accepted.*FSDP"):
        processes._state.__wrapped__()
