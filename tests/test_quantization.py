"""Quantised frozen weights: what torchao does runs here, on the CPU; of bitsandbytes, which needs a GPU, only what is said without one."""

import importlib.util
import warnings

import pytest
import torch
from comfy_dancegrpo import nodes, policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.forward import step
from comfy_dancegrpo.grpo.gaussian import log_prob
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import CallCount, Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.lora.full import FullSettings
from comfy_dancegrpo.policies import quantization
from comfy_dancegrpo.policies.places import Parts
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.workflow.host import Host, use
from families import flux, stable_diffusion, wan

PROMPTS = ("a large red circle in the center on a white background", "a small blue star")
TORCHAO = [name for name, kind in quantization.KINDS.items() if kind and kind.package == "torchao"]
BUILDS = {"flux": (flux.CASES[0].build, Size(64, 64)), "sd": (stable_diffusion.sd15, Size(64, 64)), "wan-2.1": (wan.wan21, Size(32, 32, 5)),
          "wan-2.2-a14b": (wan.wan22_a14b, Size(32, 32, 5))}
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install torchao")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (build, _) in BUILDS.items():
        build().save_pretrained(folder / "diffusers" / name)
    with use(Host(models=folder)):
        yield folder


def linear(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


def unpacked(policy):
    """The same policy, its quantised weights as ordinary ones of the values that they stand for."""
    for module in policy.denoisers.values():
        for layer in linear(module):
            layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return policy


def plan_of(policy, size):
    noisy = "dance_sde" if policy.process == "flow" else "ddim"
    return SamplingPlan(policy.time_grid(3, 0.0, size), noisy, 0.7, 3.5, size)


def gradient(policy, size):
    """(log-probability of two transitions, its gradient by the LoRA's parameters) of the same weights and noise."""
    adapter = Adapter(policy, LoraSettings(2, 4.0, "all linear layers"))
    try:
        adapter.load({name: torch.randn(p.shape, generator=generator("lora", name)) * 0.05 for name, p in adapter.parameters.items()})
        plan, x = plan_of(policy, size), torch.randn(2, *policy.latent_shape(size), generator=generator("x"))
        with torch.enable_grad():
            gaussian = step(policy, x, torch.tensor([0, 1]), encode(policy, PROMPTS, size), plan, torch.ones(2, dtype=torch.bool), CallCount(), 2)
            found = log_prob(x, gaussian).sum()
            found.backward()
        return found.item(), {name: p.grad.clone() for name, p in adapter.parameters.items() if p.grad is not None}
    finally:
        adapter.remove()


@needs_torchao
@pytest.mark.parametrize("name", TORCHAO)
@pytest.mark.parametrize("family", BUILDS)
def test_it_computes_and_learns_as_the_weights_that_it_stands_for(models, family, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        policy, size = policies.load(family, quantized=name), BUILDS[family][1]
        plain = policies.load(family)
        assert policy.quantized == name and plain.quantized == "none"
        for module, other in zip(policy.denoisers.values(), plain.denoisers.values()):
            errors = [(a.weight.dequantize() - b.weight).abs().max() / b.weight.abs().max() for a, b in zip(linear(module), linear(other), strict=True)]
            assert max(errors) < 0.05 and sum(error > 0 for error in errors) > 0.8 * len(errors)  # Wan keeps its embedding of the time in float32
            assert not any(p.requires_grad for p in module.parameters())
        for part in ("vae", "text_encoder"):
            assert all(torch.equal(a, b) for a, b in zip(policy.pipeline.components[part].parameters(), plain.pipeline.components[part].parameters(), strict=True))
        value, found = gradient(policy, size)
    expected_value, expected = gradient(unpacked(policy), size)
    assert value == pytest.approx(expected_value, rel=1e-4) and found.keys() == expected.keys() != set()
    for key, one in found.items():
        assert (one - expected[key]).norm() <= 1e-3 * expected[key].norm() + 1e-7, key


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TORCHAO)
def test_a_lora_trains_on_it_with_ratio_one(models, name, dtype, one_thread):
    policy, size = policies.load("flux", dtype, quantized=name), Size(64, 64)
    before = [layer.weight.dequantize().clone() for layer in linear(policy.denoiser)]
    adapter = Adapter(policy, LoraSettings(2, 4.0, "attention"))
    try:
        learner = Learner(policy, adapter.parameters, OptimizerSettings(learning_rate=1e-3), "run")
        for iteration in range(2):
            request = Request(PROMPTS, 2, policy.latent_shape(size), seed=1, iteration=iteration, micro_batch=2)
            rollout = sample(policy, request, encode(policy, PROMPTS, size), plan_of(policy, size), learner.version)
            scores = combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),)))
            stats = update(learner, scores, UpdateSettings(train_fraction=1.0))
            assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0
        assert any(p.any() for key, p in adapter.parameters.items() if ".lora_B." in key)
    finally:
        adapter.remove()
    assert all(torch.equal(layer.weight.dequantize(), value) for layer, value in zip(linear(policy.denoiser), before, strict=True))


@needs_torchao
@pytest.mark.parametrize("family", ["flux", "wan-2.1"])
def test_a_single_file_is_quantised_alike(models, family):
    folder = policies.load(family, quantized=TORCHAO[0])
    (models / "diffusion_models").mkdir(exist_ok=True)
    weights = (models / "diffusers" / family / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    (models / "diffusion_models" / f"{family}.safetensors").write_bytes(weights)
    file = policies.load(f"{family}.safetensors", parts=Parts(components=family), quantized=TORCHAO[0])
    for one, other in zip(linear(file.denoiser), linear(folder.denoiser), strict=True):
        assert type(one.weight) is type(other.weight) and torch.equal(one.weight.dequantize(), other.weight.dequantize())


@needs_torchao
def test_all_weights_cannot_be_trained(models):
    with pytest.raises(ValueError, match=r"the weights of 'flux' are quantised \(int8 \(torchao\)\), and cannot be trained themselves; accepted: a LoRA, or"):
        FullSettings().attach(policies.load("flux", quantized="int8 (torchao)"))


def test_a_missing_package_is_one_line(models, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check = nodes.NODE_CLASS_MAPPINGS["DanceGRPOLoadPolicy"].VALIDATE_INPUTS
    line = 'input "quantization": found \'int8 (torchao)\', which needs torchao; pip install torchao, or choose another'
    assert check("embedded", quantization="int8 (torchao)") == line and check("embedded") is True
    assert "found 'int2', accepted: 'none', 'int8 (torchao)'" in check("embedded", quantization="int2")
    with pytest.raises(RunError, match="needs bitsandbytes; pip install bitsandbytes"):
        policies.load("flux", quantized="nf4 (bitsandbytes)")


def test_what_needs_a_gpu_says_so_where_there_is_none(models, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("comfy_dancegrpo.processes.device", lambda: torch.device("cpu"))
    with pytest.raises(RunError, match="found 'nf4 \\(bitsandbytes\\)', which needs a GPU, and there is none; accepted here: 'none', 'int8 \\(torchao\\)', "):
        policies.load("flux", quantized="nf4 (bitsandbytes)")
    with pytest.raises(RunError, match="found '8-bit \\(bitsandbytes\\)' and a single file, accepted for that: 'none', 'int8 \\(torchao\\)', "):
        quantization.apply("8-bit (bitsandbytes)", torch.nn.Linear(2, 2))
