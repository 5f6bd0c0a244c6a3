"""The estimate of memory against what is there when everything is loaded."""

import dataclasses

import pytest
import torch

from comfy_dancegrpo import memory, policies
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.policies.places import Parts
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.workflow.host import Host, use
from families import stable_diffusion, wan

WANTED = memory.Wanted(policy="embedded", parts=Parts(), dtype="float32", lora=LoraSettings(4, 4.0, "all linear layers"), optimizer="adamw", ema=True,
                       gradient_checkpointing=False, micro_batch=4, samples=8, steps=6, size=Size(64, 64))
BUILDS = {"embedded": None, "wan": wan.wan22_a14b, "sd": stable_diffusion.sd15}


def replaced(**changes):
    return dataclasses.replace(WANTED, **changes)


@pytest.mark.parametrize("name", BUILDS)
def test_weights_lora_optimizer_and_trajectories_are_those_of_the_loaded_model(name, tmp_path):
    if BUILDS[name]:
        BUILDS[name]().save_pretrained(tmp_path / "diffusers" / name)
    size = Size(32, 32, 5) if name == "wan" else Size(64, 64)
    with use(Host(models=tmp_path)):
        found = memory.estimate(replaced(policy=name, size=size))
        policy = policies.load(name)
    weights = {part: sum(p.numel() * 4 for p in policy.pipeline.components[part].parameters()) for part in ("vae", "text_encoder")}
    assert found["weights of the denoiser"] == sum(p.numel() * 4 for m in policy.denoisers.values() for p in m.parameters())
    assert found["weights of the VAE"] == weights["vae"]
    texts = sum(p.numel() * 4 for m in policy.encoders for p in m.parameters())
    assert abs(found["weights of the text encoders (while they encode)"] - texts) < 0.02 * texts  # a file may hold a buffer too
    learner = Learner(policy, Adapter(policy, WANTED.lora).parameters, OptimizerSettings(ema_decay=0.9), "run")
    for p in learner.parameters.values():
        p.grad = torch.ones_like(p)
    numbers = sum(p.numel() for p in learner.parameters.values())
    assert found["LoRA, its gradient and average"] == 4 * (numbers + sum(p.grad.numel() for p in learner.parameters.values()) + sum(v.numel() for v in learner.ema.values()))
    learner.optimizer_step()
    moments = sum(v.numel() * 4 for key, v in learner.state().items() if key.startswith("optimizer.exp"))
    assert found["state of adamw"] == moments
    assert found["trajectories"] == 8 * 6 * 4 * torch.zeros(policy.latent_shape(size)).numel()


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    def activations(**changes):
        return memory.estimate(replaced(**changes))["activations in training (rough)"]

    assert activations(micro_batch=8) == 2 * activations()
    assert activations(gradient_checkpointing=True) < activations() / 2
    assert activations(size=Size(64, 32)) == activations() / 2


def test_activations_are_within_a_factor_of_two_of_what_autograd_keeps():
    policy = policies.load("embedded")
    adapter = Adapter(policy, LoraSettings(4, 4.0, "attention and feed-forward"))
    weights = {p.untyped_storage().data_ptr() for p in policy.denoiser.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    plan = SamplingPlan(policy.time_grid(4, 3.0, WANTED.size), "dance_sde", 0.3, 3.5, WANTED.size)
    conditioning = encode(policy, ("a small blue star",) * 4, WANTED.size)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = policy.predict(torch.randn(4, *policy.latent_shape(WANTED.size)), plan.grid.timesteps[1].expand(4), conditioning, plan)
    finally:
        adapter.remove()
    assert output.requires_grad
    assert 0.5 < memory.estimate(WANTED)["activations in training (rough)"] / sum(kept.values()) < 2


def test_the_report_names_what_dominates():
    lines = memory.report(WANTED)
    sizes = [float(line.split()[0]) for line in lines[1:-1]]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 7
    assert "an estimate" in lines[0] and "dominate with" in lines[-1]


def test_the_command_prints_it_and_loads_nothing(cli, monkeypatch, quickstart, tmp_path):
    monkeypatch.setattr(policies, "load", lambda *a, **k: pytest.fail("weights were loaded"))
    done = cli("validate", quickstart, "--memory", "--output", tmp_path)
    assert done.status == 0, done
    assert any(line.startswith("memory of embedded, ") for line in done.out) and "dominate with" in done.out[-1]
    without = cli("validate", quickstart, "--output", tmp_path)
    assert len(without.out) == 1
