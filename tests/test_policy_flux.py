"""The FLUX family and its LoRA against diffusers' own pipeline and loaders, and ComfyUI's.

Any weights will do: no test looks at what the pictures show.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from complaints import complaints
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from comfy_dancegrpo import policies
from comfy_dancegrpo.embedded import POLICY
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import Column, Conditioning, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, initial_noise, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot, applied
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.workflow.host import Host, use

PROMPTS = ("a large red circle in the center on a white background", "a small blue star at the top left on a black background")
STEPS = 3
SIZE = Size(64, 64)
LORA = LoraSettings(rank=4, alpha=10.0, targets="all linear layers")

pytestmark = pytest.mark.skipif(not (POLICY / "model_index.json").is_file(), reason="the embedded policy is not in this checkout")


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded")


def request_of(policy, height=64, width=64, group_size=2, micro_batch=4):
    return Request(PROMPTS, group_size, policy.latent_shape(Size(height, width)), seed=1, iteration=0, shared_noise=False, micro_batch=micro_batch)


def roll(policy, shift=0.0, height=64, width=64, transition="ode", eta=0.0, guidance=3.5, version=("run", 0), steps=STEPS, **more):
    size = Size(height, width)
    plan = SamplingPlan(policy.time_grid(steps, shift, size), transition, eta, guidance, size)
    return sample(policy, request_of(policy, height, width, **more), encode(policy, PROMPTS, size), plan, version)


def pipeline_pictures(pipeline, policy, height=64, width=64, guidance=3.5):
    """What `FluxPipeline` itself makes of the request's own prompts and noise: [4, H, W, 3]."""
    request = request_of(policy, height, width)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=[PROMPTS[g] for g in request.groups], latents=initial_noise(request, torch.arange(4)), height=height,
                    width=width, num_inference_steps=STEPS, guidance_scale=guidance, max_sequence_length=16, output_type="np").images


def predict(policy):
    """One denoiser call, to compare before and after."""
    plan = SamplingPlan(policy.time_grid(STEPS, 0.0, SIZE), size=SIZE)
    latents = torch.randn(2, *policy.latent_shape(SIZE), generator=generator("predict"))
    with torch.no_grad():
        return policy.predict(latents, plan.grid.timesteps[1].expand(2), encode(policy, PROMPTS, SIZE), plan)


def random_tensors(adapter, key):
    return {name: torch.randn(p.shape, generator=generator(key, name)) * 0.05 for name, p in adapter.parameters.items()}


def snapshot_of(policy, tensors, settings=LORA):
    return LoraSnapshot(tensors, settings, policy.name, policy.lora_layout, 7, False, Path("run"))


@pytest.fixture(scope="module")
def snapshot(policy):
    adapter = Adapter(policy, LORA)
    try:
        return snapshot_of(policy, random_tensors(adapter, "snapshot"))
    finally:
        adapter.remove()


# -- the same picture as the pipeline's -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transition", ["ode", "dance_sde"])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_without_noise_the_picture_is_the_pipelines(policy, shift, transition):
    pipeline = FluxPipeline.from_pretrained(POLICY, torch_dtype=torch.float32)
    if shift:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=shift)
    theirs = pipeline_pictures(pipeline, policy)
    rollout = roll(policy, shift, transition=transition)
    assert rollout.pictures.shape == (4, 64, 64, 3) and rollout.pictures.dtype == torch.float32
    assert np.abs(theirs - rollout.pictures.numpy()).max() < 1e-5
    assert np.ptp(theirs) > 0.1 and np.abs(theirs - roll(policy, 1.5).pictures.numpy()).max() > 1e-3  # and the shift matters


def test_with_dynamic_shifting_and_guidance(tmp_path):
    """Of the kind of FLUX.1-dev: the shift follows the picture's size, and guidance is an input of the model."""
    pipeline = FluxPipeline.from_pretrained(POLICY, torch_dtype=torch.float32)
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel.from_config({**pipeline.transformer.config, "guidance_embeds": True})
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, shift=3.0))
    pipeline.save_pretrained(tmp_path / "diffusers" / "tiny")
    with use(Host(models=tmp_path)):
        assert policies.available() == ["embedded", "embedded_diffusion", "tiny"]
        policy = policies.load("tiny")
    for height, width, guidance in ((64, 32, 3.5), (64, 64, 7.0)):
        theirs = pipeline_pictures(pipeline, policy, height, width, guidance)
        ours = roll(policy, height=height, width=width, guidance=guidance).pictures.numpy()
        assert ours.shape == (4, height, width, 3) and np.abs(theirs - ours).max() < 1e-5
        np.testing.assert_array_equal(policy.time_grid(STEPS, 0.0, Size(height, width)).levels, pipeline.scheduler.sigmas)
    assert np.abs(theirs - roll(policy, guidance=1.0).pictures.numpy()).max() > 1e-4  # and guidance matters
    flat = policy.time_grid(STEPS, 2.0, SIZE).levels.double().numpy()  # a shift that is given replaces the dynamic one
    t = np.linspace(1, 0, STEPS + 1)
    np.testing.assert_allclose(flat, 2 * t / (1 + t), atol=1e-6)


def test_a_size_that_the_latents_cannot_have(policy):
    with pytest.raises(ValueError, match="found 60x64 pixels, accepted: multiples of 8"):
        policy.latent_shape(Size(64, 60))


def test_guidance_of_a_model_in_half_precision_is_reckoned_in_float32(policy, monkeypatch):
    sides = {side: torch.randn(2, 4, generator=generator("side", side)).bfloat16() for side in ("positive", "negative")}
    monkeypatch.setattr(policy, "classifier_free", True, raising=False)
    monkeypatch.setattr(policy, "denoise", lambda x, t, tensors, plan: sides["positive" if "mark" in tensors else "negative"])
    plan = SamplingPlan(policy.time_grid(STEPS, 0.0, SIZE), guidance_scale=5.0, size=SIZE)
    found = policy.predict(torch.zeros(2, 4), plan.grid.timesteps[:2], Conditioning({"mark": torch.zeros(2, 1)}), plan)
    exact = sides["negative"].double() + 5.0 * (sides["positive"].double() - sides["negative"].double())
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5


def test_a_diffusers_without_the_family_is_named(monkeypatch):
    import diffusers
    from comfy_dancegrpo.errors import RunError

    monkeypatch.delitem(sys.modules, "comfy_dancegrpo.policies.flux", raising=False)
    monkeypatch.delattr(policies, "flux", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", type(sys)("diffusers"))
    sys.modules["diffusers"].__version__ = "0.1"
    with pytest.raises(RunError, match=r'input "policy": Flux needs a newer diffusers than 0\.1: .*FluxKontextPipeline'):
        policies.load("embedded")
    assert diffusers.__version__ != "0.1"


# -- ratio one --------------------------------------------------------------------------------------------------------------------
def first_update(policy, micro_batch):
    """An update of a LoRA that is not at its start, on its own fresh rollout."""
    adapter = Adapter(policy, LORA)
    try:
        adapter.load(random_tensors(adapter, "live"))
        learner = Learner(policy, adapter.parameters, OptimizerSettings(), "run")
        rollout = roll(policy, transition="dance_sde", eta=0.7, group_size=3, micro_batch=micro_batch, version=learner.version)
        scores = Scores(rollout, (Column("toy", 1.0, torch.arange(6.0)),))
        return rollout, update(learner, combine(scores), UpdateSettings(train_fraction=1.0))
    finally:
        adapter.remove()


def test_replay_gives_the_ratio_one_exactly(policy):
    rollout, stats = first_update(policy, micro_batch=16)
    assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0
    assert (rollout.calls.forward, rollout.calls.padded, stats.calls.backward, stats.calls.padded) == (48, 30, 16, 4)


@pytest.mark.parametrize("micro_batch", [5, 4, 3])
def test_replay_gives_the_ratio_one_in_any_micro_batch(policy, micro_batch, one_thread):
    """One thread: where two share a matrix of few rows, its rows may round differently by their place in the batch."""
    assert first_update(policy, micro_batch)[1].ratio_deviation == 0.0


def test_half_precision_trains_in_float32_and_replays_within_the_clip_range():
    half = policies.load("embedded", "bfloat16")
    adapter = Adapter(half, LORA)
    assert all(p.dtype == torch.float32 for p in adapter.parameters.values())
    adapter.remove()
    rollout, stats = first_update(half, micro_batch=16)
    assert rollout.states.dtype == rollout.log_probs.dtype == torch.float32
    assert stats.ratio_deviation <= 1e-4 and 0 < stats.grad_norm < float("inf")


# -- the LoRA file ----------------------------------------------------------------------------------------------------------------
def test_diffusers_loads_the_file_whole_and_at_full_strength(policy, snapshot, tmp_path):
    path = tmp_path / "tuned.safetensors"
    files.save(snapshot, path)
    with applied(policy, snapshot):
        ours = roll(policy).pictures.numpy()
    pipeline = FluxPipeline.from_pretrained(POLICY, torch_dtype=torch.float32)
    before = pipeline_pictures(pipeline, policy)

    with complaints(but="No LoRA keys associated to CLIPTextModel") as said:
        pipeline.load_lora_weights(path)
    assert said == []
    injected = {name.replace(".default_0.", "."): value for name, value in pipeline.transformer.named_parameters() if ".lora_" in name}
    stored = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    assert injected.keys() == stored.keys() and len(stored) == 2 * (2 * 14 + 3 * 6)
    assert all(torch.equal(value, stored[name]) for name, value in injected.items())

    theirs = pipeline_pictures(pipeline, policy)
    assert np.abs(theirs - ours).max() < 1e-5
    assert np.abs(theirs - before).max() > 1e-2  # it does something


def test_a_foreign_key_would_be_noticed(policy, snapshot, tmp_path):
    """The test above can fail: diffusers does complain of a key that it has no place for."""
    extra = {"transformer_blocks.9.attn.to_q.lora_A.weight": torch.zeros(4, 128), "transformer_blocks.9.attn.to_q.lora_B.weight": torch.zeros(128, 4)}
    files.save(dataclasses.replace(snapshot, tensors={**snapshot.tensors, **extra}), tmp_path / "odd.safetensors")
    pipeline = FluxPipeline.from_pretrained(POLICY, torch_dtype=torch.float32)
    with complaints(but="No LoRA keys associated to CLIPTextModel") as said:
        pipeline.load_lora_weights(tmp_path / "odd.safetensors")
    assert len(said) == 1 and "transformer_blocks.9" in said[0]


def test_the_file(snapshot, tmp_path):
    path = tmp_path / "new" / "tuned.safetensors"
    files.save(snapshot, path, {"note": "mine"})
    tensors = load_file(path)
    assert tensors.keys() == {f"transformer.{name}" for name in snapshot.tensors} and not any("alpha" in name for name in tensors)
    for name, value in snapshot.tensors.items():
        torch.testing.assert_close(tensors[f"transformer.{name}"], value * (2.5 if ".lora_B." in name else 1), rtol=1e-7, atol=0)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["note"] == "mine" and header["dancegrpo.iterations"] == "7" and header["dancegrpo.alpha"] == "10.0"
    assert [p.name for p in path.parent.iterdir()] == ["tuned.safetensors"]


COMFYUI = """
import json, logging, sys
path, config = sys.argv[1], json.loads(sys.argv[2])
sys.argv[1:] = ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.lora, comfy.model_base, comfy.supported_models, safetensors.torch, torch
said = []
logging.getLogger().addFilter(lambda record: said.append(record.getMessage()))
model = comfy.model_base.Flux(comfy.supported_models.Flux(config))
lora = safetensors.torch.load_file(path)
keys = comfy.lora.model_lora_keys_unet(model, {})
patches, weights, worst = comfy.lora.load_lora(lora, keys), model.state_dict(), 0.0
for name in {key.rsplit(".lora_", 1)[0] for key in lora}:
    key, offset = keys[name] if isinstance(keys[name], tuple) else (keys[name], None)
    found = comfy.lora.calculate_weight([(1.0, patches[keys[name]], 1.0, offset, None)], torch.zeros_like(weights[key]).float(), key)
    if offset is not None:
        rest = found.clone()
        rest.narrow(*offset).zero_()
        worst = max(worst, rest.abs().max().item())
        found = found.narrow(*offset)
    expected = lora[name + ".lora_B.weight"] @ lora[name + ".lora_A.weight"]
    assert found.shape == expected.shape and expected.abs().max() > 0
    worst = max(worst, (found - expected).abs().max().item())
print(json.dumps({"patches": len(patches), "said": [line for line in said if "lora" in line], "worst": worst}))
"""


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to ComfyUI's folder to load the LoRA with its own code")
def test_comfyui_loads_the_file_whole_and_at_full_strength(policy, snapshot, tmp_path):
    """Its own model of the policy's size, its own key map and patches: what they add to each weight is lora_B @ lora_A."""
    files.save(snapshot, tmp_path / "tuned.safetensors")
    c = policy.denoiser.config
    config = {"image_model": "flux", "in_channels": c.in_channels // 4, "out_channels": c.in_channels // 4, "patch_size": 2,
              "vec_in_dim": c.pooled_projection_dim, "context_in_dim": c.joint_attention_dim, "mlp_ratio": 4.0, "theta": 10000,
              "hidden_size": c.num_attention_heads * c.attention_head_dim, "num_heads": c.num_attention_heads, "depth": c.num_layers,
              "depth_single_blocks": c.num_single_layers, "axes_dim": list(c.axes_dims_rope), "qkv_bias": True,
              "guidance_embed": c.guidance_embeds}
    path = os.pathsep.join(filter(None, [os.environ["COMFYUI_PATH"], os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", COMFYUI, str(tmp_path / "tuned.safetensors"), json.dumps(config)],
                          env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"ComfyUI's requirements are not all installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["said"] == [] and found["patches"] == len(snapshot.tensors) // 2
    assert found["worst"] < 1e-6


# -- attaching and removing -------------------------------------------------------------------------------------------------------
@pytest.fixture
def bare(policy):
    """The denoiser's names, values and output, before; the test leaves it as it was."""
    module = policy.denoiser
    before, output = {name: value.clone() for name, value in module.state_dict().items()}, predict(policy)
    yield output
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(predict(policy), output)
    assert not any(p.requires_grad for p in module.parameters())


def test_a_fresh_adapter_changes_nothing_and_comes_off_whole(policy, bare):
    adapter = Adapter(policy, LORA, seed=3)
    assert torch.equal(predict(policy), bare)
    trained = {name for name, p in policy.denoiser.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter.parameters) == 92
    again = Adapter(policy, LORA, seed=3)
    assert all(torch.equal(p, again.parameters[name]) for name, p in adapter.parameters.items())
    again.remove()
    for name, p in adapter.parameters.items():
        a = ".lora_A." in name
        assert p.shape[0 if a else 1] == 4 and bool(p.any()) is a and p.abs().max() <= p.shape[-1] ** -0.5
    adapter.remove()


def test_a_snapshot_is_applied_while_the_block_runs(policy, bare, snapshot):
    with applied(policy, snapshot):
        assert (predict(policy) - bare).abs().max() > 1e-3
    with pytest.raises(KeyError), applied(policy, snapshot):
        raise KeyError  # the fixture sees that it came off all the same


def test_a_second_adapter_stands_in_for_the_first_and_gives_it_back(policy, bare, snapshot):
    with applied(policy, snapshot):
        alone = predict(policy)
    first = Adapter(policy, dataclasses.replace(LORA, rank=2))
    first.load(random_tensors(first, "first"))
    mine, values = predict(policy), {name: p.detach().clone() for name, p in first.parameters.items()}
    with applied(policy, snapshot):
        assert torch.equal(predict(policy), alone)  # the snapshot's LoRA by itself, not on top of the first
    assert torch.equal(predict(policy), mine)
    assert all(p.requires_grad and torch.equal(p, values[name]) for name, p in first.parameters.items())
    assert {id(p) for p in policy.denoiser.parameters() if p.requires_grad} == {id(p) for p in first.parameters.values()}
    first.remove()


def test_a_lora_of_another_shape_is_refused(policy, bare, snapshot):
    with pytest.raises(ValueError, match="does not fit this policy: 42 names differ"):
        with applied(policy, dataclasses.replace(snapshot, settings=dataclasses.replace(LORA, targets="attention"))):
            pass
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    for odd in (torch.zeros(4, 64), torch.zeros(1, 128)):  # of another width, and one that would broadcast
        with pytest.raises(ValueError, match="does not fit this policy"):
            with applied(policy, dataclasses.replace(snapshot, tensors={**snapshot.tensors, name: odd})):
                pass


def test_targets_that_the_family_does_not_have(policy, bare):
    with pytest.raises(ValueError, match="found 'nothing', accepted: one of 'attention'"):
        Adapter(policy, dataclasses.replace(LORA, targets="nothing"))
