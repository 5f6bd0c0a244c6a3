"""Drawing with the tuned policy: the Sample node and `dancegrpo sample`, against diffusers' own pipeline."""

import dataclasses
import shutil

import native
import numpy as np
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.embedded import POLICY
from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot
from comfy_dancegrpo.nodes.load_policy import LoadPolicy
from comfy_dancegrpo.nodes.sample import Sample
from comfy_dancegrpo.prompts import PromptList
from comfy_dancegrpo.runs import video
from comfy_dancegrpo.trainer.drawing import Wanted, draw_and_save
from comfy_dancegrpo.workflow.host import Host, use
from diffusers import FluxPipeline
from families import wan
from PIL import Image
from safetensors.torch import load_file, save_file

PROMPTS = ("a large red circle in the center on a white background", "a small blue star at the top left on a black background")
STEPS = 2


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded")


@pytest.fixture(scope="module")
def snapshot(policy, tmp_path_factory):
    settings = LoraSettings(rank=4, alpha=4.0, targets="modulation")
    adapter = Adapter(policy, settings)
    tensors = {name: torch.randn(p.shape, generator=generator("sample", name)) * 0.05 for name, p in adapter.parameters.items()}
    adapter.remove()
    return LoraSnapshot(tensors, settings, policy.name, policy.lora_layout, 1, False, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def lora(snapshot, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "tuned.safetensors"
    files.save(snapshot, path)
    return path


def expected(lora=None, seeds=(5, 6)):
    """[prompts x seeds, 64, 64, 3], by the pipeline alone."""
    pipeline = FluxPipeline.from_pretrained(POLICY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return np.stack([pipeline(prompt, height=64, width=64, num_inference_steps=STEPS, max_sequence_length=16, output_type="np",
                              generator=torch.Generator().manual_seed(seed)).images[0] for prompt in PROMPTS for seed in seeds])


def drawn(policy, lora=None):
    (pictures,), = Sample().sample(policy, PromptList(PROMPTS), STEPS, 3.5, 64, 64, 1, 5, 2, lora)
    return pictures


def test_the_node_draws_as_the_pipeline_does(policy, lora, snapshot):
    base = drawn(policy)
    assert base.shape == (4, 64, 64, 3) and base.dtype == torch.float32
    np.testing.assert_allclose(base, expected(), rtol=0, atol=1e-5)  # a VAE whose channels lie last rounds otherwise
    tuned = drawn(policy, snapshot)
    assert np.abs(tuned.numpy() - expected(lora)).max() < 1e-5 and (tuned - base).abs().max() > 1e-2
    assert torch.equal(drawn(policy), base)  # the LoRA came off


def test_the_command_draws_with_a_file(cli, lora, tmp_path):
    words = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", STEPS, "--seed", 5, "--count", 2, "--output", tmp_path)
    done = cli("sample", "--lora", lora, *words)
    assert done.status == 0 and len(done.out) == 4
    found = np.stack([np.asarray(Image.open(path)) for path in done.out])
    np.testing.assert_allclose(found, (expected(lora) * 255).round(), atol=1)
    again = cli("sample", *words)
    assert not set(again.out) & set(done.out)  # nothing is overwritten


def test_the_command_writes_a_video_file_for_each_sample(cli, tmp_path):
    models = tmp_path / "models"
    wan.wan21().save_pretrained(models / "diffusers" / "wan")
    done = cli("sample", "--policy", "wan", "--models", models, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--count", 2, "--seed", 5, "--steps", STEPS,
               "--guidance-scale", 5, "--frames", 5, "--width", 48, "--height", 32, "--fps", 24, "--output", tmp_path)
    assert done.status == 0 and done.out == [str(tmp_path / "samples" / f"sample_{n:05d}_.mp4") for n in (1, 2, 3, 4)], done.err
    assert not list(tmp_path.rglob("*.png"))
    with use(Host(models=models)):
        (policy,) = LoadPolicy().load("wan", "float32")
        (expected,) = Sample().sample(policy, PromptList(PROMPTS), STEPS, 5.0, 48, 32, 5, 5, 2)
    for path, sample in zip(done.out, expected, strict=True):
        frames, fps = video.read(path)
        assert frames.shape == (5, 32, 48, 3) and fps == 24.0
        video.write(sample, tmp_path / "own.mp4", 24.0)
        assert (frames - video.read(tmp_path / "own.mp4")[0]).abs().mean() < 1e-3
    assert (expected[0] - expected[1]).abs().mean() > 0.01  # so that one in another's place is seen


@pytest.fixture
def in_parts(tmp_path):
    """A models folder: the embedded policy's denoiser, VAE and text encoders as files, and a diffusers folder without any weights."""
    models = tmp_path / "models"
    shutil.copytree(POLICY, models / "diffusers" / "rest", ignore=shutil.ignore_patterns("*.safetensors"))
    for kind in ("diffusion_models", "vae", "text_encoders"):
        (models / kind).mkdir()
    shutil.copy(POLICY / "transformer" / "diffusion_pytorch_model.safetensors", models / "diffusion_models" / "flux.safetensors")
    save_file(native.vae(load_file(POLICY / "vae" / "diffusion_pytorch_model.safetensors")), models / "vae" / "ae.safetensors")
    for component, name in (("text_encoder", "clip"), ("text_encoder_2", "t5")):
        shutil.copy(POLICY / component / "model.safetensors", models / "text_encoders" / f"{name}.safetensors")
    return models


def test_the_command_draws_with_a_policy_in_parts(cli, in_parts, lora, tmp_path):
    words = ("sample", "--policy", "flux.safetensors", "--models", in_parts, "--text-encoder", "clip.safetensors", "--text-encoder-2", "t5.safetensors",
             "--lora", lora, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", STEPS, "--seed", 5, "--count", 2, "--output", tmp_path)
    lacks = cli(*words)
    file = in_parts / "diffusion_models" / "flux.safetensors"
    assert lacks.status == 3 and len(lacks.verdict) == 1 and lacks.verdict[0].startswith(f"--policy: {file} holds no vae, and ")
    assert lacks.verdict[0].endswith("; accepted: a file at --vae, or those weights")
    done = cli(*words, "--vae", "ae.safetensors", "--components", "rest")
    assert done.status == 0, done.err
    np.testing.assert_allclose(np.stack([np.asarray(Image.open(path)) for path in done.out]), (expected(lora) * 255).round(), atol=1)


def test_every_part_of_load_policy_is_an_option_of_the_command(cli, tmp_path):
    named = [name for name in LoadPolicy.INPUT_TYPES()["optional"] if name not in ("prompt_cache", "attention_backend", "compile")]
    for name in named:
        option = "--" + name.replace("_", "-")
        done = cli("sample", option, 1.5, "--prompt", "x", "--output", tmp_path)
        assert done.status in (2, 3) and len(done.verdict) == 1 and done.verdict[0].startswith(f"{option}: found "), done.err


@pytest.mark.parametrize("words, line", [
    ((), "found no prompt, accepted: --prompt TEXT or --prompts FILE"),
    (("--prompt", "x", "--policy", "nowhere"), "which is in none of the folders searched"),
    (("--prompt", "x", "--lora", "nowhere.safetensors"), "--lora: found nowhere.safetensors, which is not a file"),
    (("--prompt", "x", "--width", "60"), "found 60x64 pixels, accepted: multiples of 8"),
    (("--prompt", "x", "--dtype", "int"), "--dtype: found 'int', accepted: float32, bfloat16, float16"),
])
def test_what_cannot_be_drawn(cli, words, line, tmp_path):
    done = cli("sample", *words, "--output", tmp_path)
    assert done.status in (2, 3) and len(done.verdict) == 1 and line in done.verdict[0]
    assert not list(tmp_path.rglob("*.png"))


def test_only_the_size_is_blamed_on_the_size(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ValueError("a scheduler's own fault")

    wanted = Wanted(("x",), "", "embedded", None, 64, 64, 1, 1, 1.0, 0, 1, "float32")
    with use(Host(output=tmp_path)):
        with pytest.raises(WorkflowError, match="^--width, --height, --frames: found 60x64 pixels, accepted: multiples of 8"):
            draw_and_save(dataclasses.replace(wanted, width=60))
        monkeypatch.setattr("diffusers.FluxPipeline.__call__", broken)
        with pytest.raises(ValueError, match="^a scheduler's own fault$"):
            draw_and_save(wanted)
