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
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from comfy_dancegrpo import policies
from comfy_dancegrpo.embedded import POLICY
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Scores
from comfy_dancegrpo.grpo.rollout import Request, initial_noise, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot, applied
from comfy_dancegrpo.runs.session import encode
from comfy_dancegrpo.workflow.host import Host, use

PROMPTS = ("a large red circle in the center on a white background", "a small blue star at the top left on a black background")
STEPS = 3
LORA = LoraSettings(rank=4, alpha=10.0, targets="all linear layers")

pytestmark = pytest.mark.skipif(not (POLICY / "model_index.json").is_file(), reason="the embedded policy is not in this checkout")


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def request_of(policy, height=64, width=64, group_size=2, micro_batch=4):
    return Request(PROMPTS, group_size, policy.latent_shape(height, width), seed=1, iteration=0, shared_noise=False, micro_batch=micro_batch)


def roll(policy, shift=0.0, height=64, width=64, transition="ode", eta=0.0, guidance=3.5, version=("run", 0), steps=STEPS, **more):
    plan = SamplingPlan(policy.time_grid(steps, shift, height, width), transition, eta, guidance, height, width)
    return sample(policy, request_of(policy, height, width, **more), encode(policy, PROMPTS, {}), plan, version)


def pipeline_pictures(pipeline, policy, height=64, width=64, guidance=3.5):
    """What `FluxPipeline` itself makes of the request's own prompts and noise: [4, H, W, 3]."""
    request = request_of(policy, height, width)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=[PROMPTS[g] for g in request.groups], latents=initial_noise(request, torch.arange(4)), height=height,
                    width=width, num_inference_steps=STEPS, guidance_scale=guidance, max_sequence_length=16, output_type="np").images


def predict(policy):
    """One denoiser call, to compare before and after."""
    plan = SamplingPlan(policy.time_grid(STEPS, 0.0, 64, 64), height=64, width=64)
    latents = torch.randn(2, *policy.latent_shape(64, 64), generator=generator("predict"))
    with torch.no_grad():
        return policy.predict(latents, plan.grid.timesteps[1].expand(2), encode(policy, PROMPTS, {}), plan)


def random_tensors(adapter, key):
    return {name: torch.randn(p.shape, generator=generator(key, name)) * 0.05 for name, p in adapter.parameters.items()}


def snapshot_of(policy, tensors, settings=LORA):
    return LoraSnapshot(tensors, settings, policy.name, policy.lora_prefix, 7, False, Path("run"))


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
        assert policies.available() == ["embedded", "tiny"]
        policy = policies.load("tiny")
    for height, width, guidance in ((64, 32, 3.5), (64, 64, 7.0)):
        theirs = pipeline_pictures(pipeline, policy, height, width, guidance)
        ours = roll(policy, height=height, width=width, guidance=guidance).pictures.numpy()
        assert ours.shape == (4, height, width, 3) and np.abs(theirs - ours).max() < 1e-5
        np.testing.assert_array_equal(policy.time_grid(STEPS, 0.0, height, width).levels, pipeline.scheduler.sigmas)
    assert np.abs(theirs - roll(policy, guidance=1.0).pictures.numpy()).max() > 1e-4  # and guidance matters
    flat = policy.time_grid(STEPS, 2.0, 64, 64).levels.double().numpy()  # a shift that is given replaces the dynamic one
    t = np.linspace(1, 0, STEPS + 1)
    np.testing.assert_allclose(flat, 2 * t / (1 + t), atol=1e-6)


def test_a_size_that_the_latents_cannot_have(policy):
    with pytest.raises(ValueError, match="found 60x64 pixels, accepted: multiples of 8"):
        policy.latent_shape(64, 60)


# -- ratio one --------------------------------------------------------------------------------------------------------------------
def first_update(policy, micro_batch):
    """An update of a LoRA that is not at its start, on its own fresh rollout."""
    adapter = Adapter(policy, LORA)
    try:
        adapter.load(random_tensors(adapter, "live"))
        learner = Learner(policy, adapter.parameters, OptimizerSettings(), "run")
        rollout = roll(policy, transition="dance_sde", eta=0.7, group_size=3, micro_batch=micro_batch, version=learner.version)
        scores = Scores(rollout, (("toy", 1.0, torch.arange(6.0)),))
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

    said = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.warns() as warned:
            pipeline.load_lora_weights(path)
            warnings_of_ours = [str(w.message) for w in warned if "key" in str(w.message).lower()]
            __import__("warnings").warn("at least one, as pytest.warns asks")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not warnings_of_ours and not [line for line in said if "key" in line.lower()], said
    injected = {name.replace(".default_0.", "."): value for name, value in pipeline.transformer.named_parameters() if ".lora_" in name}
    stored = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    assert injected.keys() == stored.keys() and len(stored) == 2 * (2 * 14 + 3 * 6)
    assert all(torch.equal(value, stored[name]) for name, value in injected.items())

    theirs = pipeline_pictures(pipeline, policy)
    assert np.abs(theirs - ours).max() < 1e-5
    assert np.abs(theirs - before).max() > 1e-2  # it does something
