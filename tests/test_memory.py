"""The estimate of memory against what is there when everything is loaded."""

import dataclasses
import inspect

import pytest
import torch

from comfy_dancegrpo import memory, policies
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.lora.full import FullSettings
from comfy_dancegrpo.policies.places import Parts
from comfy_dancegrpo.runs.prompt_cache import PromptCache, encode
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
    assert found["trajectories (main memory)"] == 8 * 6 * 4 * torch.zeros(policy.latent_shape(size)).numel()


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
    sizes, (beside, total) = sizes[:-1], (sizes[-1], float(lines[-1].split()[0]))
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 9
    assert "an estimate" in lines[0] and "dominate with" in lines[-1] and lines[-2].endswith("in main memory")
    parts = {line[15:]: float(line.split()[0]) for line in lines[1:-2]}
    assert beside == pytest.approx(sum(size for name, size in parts.items() if "main memory" in name), abs=0.005)
    assert total == pytest.approx(sum(size for name, size in parts.items() if "main memory" not in name and "text encoders" not in name), abs=0.005)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_is_what_it_takes(dtype, ema_decay):
    found = memory.estimate(replaced(lora=FullSettings(), dtype=dtype, ema=ema_decay > 0))
    policy = policies.load("embedded", dtype)
    trained = FullSettings().attach(policy)
    learner = Learner(policy, trained.parameters, OptimizerSettings(ema_decay=ema_decay), "run", trained.written)
    for p in learner.parameters.values():
        p.grad = torch.ones_like(p)
    held = {t.data_ptr(): t.nbytes for p in [*trained.parameters.values(), *policy.denoiser.parameters()] for t in (p, p.grad) if t is not None}
    held |= {t.data_ptr(): t.nbytes for t in (learner.ema or {}).values()}
    weights, more = found["weights of the denoiser"], found["masters, gradient and average of all weights"]
    assert weights + more == sum(held.values())
    learner.optimizer_step()
    state = sum(value.nbytes for name, value in learner.state().items() if name.startswith(("parameters.", "ema.", "optimizer.exp")))
    assert found["state to be saved, former and new (main memory)"] == 2 * state
    assert found["the base's own weights (main memory)"] == weights
    assert weights == memory.estimate(replaced(dtype=dtype))["weights of the denoiser"]
    trained.remove()


def test_prompts_in_memory_are_bounded_by_what_the_estimate_says():
    found = memory.estimate(WANTED)["encoded prompts, at most (main memory)"]
    assert found == inspect.signature(PromptCache).parameters["limit"].default
    assert "encoded prompts, at most (main memory)" not in memory.estimate(replaced(prompt_cache="disk"))


@pytest.mark.parametrize("name, weight", [("int8 (torchao)", 1), ("float8 (torchao)", 1), ("8-bit (bitsandbytes)", 1), ("nf4 (bitsandbytes)", 0.5)])
def test_quantised_weights_of_a_published_width(name, weight):
    """Against the layouts' arithmetic: a float32 scale a row of 3072, or of nf4 for each 64 numbers."""
    scale = 4 / 64 if "nf4" in name else 4 / 3072
    policy = policies.load("embedded")
    linear = sum(m.weight.numel() for m in policy.denoiser.modules() if isinstance(m, torch.nn.Linear))
    plain = memory.estimate(replaced(dtype="bfloat16"))["weights of the denoiser"]
    quantised = memory.estimate(replaced(dtype="bfloat16", quantized=name))["weights of the denoiser"]
    assert (plain - quantised) / linear == pytest.approx(2 - weight - scale, rel=0.02)


def test_the_command_prints_it_and_loads_nothing(cli, monkeypatch, quickstart, tmp_path):
    monkeypatch.setattr(policies, "load", lambda *a, **k: pytest.fail("weights were loaded"))
    done = cli("validate", quickstart, "--memory", "--output", tmp_path)
    assert done.status == 0, done
    assert any(line.startswith("memory of embedded, ") for line in done.out) and "dominate with" in done.out[-1]
    without = cli("validate", quickstart, "--output", tmp_path)
    assert len(without.out) == 1
