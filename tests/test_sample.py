"""Drawing with the tuned policy: the Sample node and `dancegrpo sample`, against diffusers' own pipeline."""

import dataclasses

import numpy as np
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.embedded import POLICY
from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot
from comfy_dancegrpo.nodes.sample import Sample
from comfy_dancegrpo.prompts import PromptList
from comfy_dancegrpo.trainer.drawing import Wanted, draw_and_save
from comfy_dancegrpo.workflow.host import Host, use
from diffusers import FluxPipeline
from PIL import Image

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


@pytest.mark.parametrize("words, line", [
    ((), "found no prompt, accepted: --prompt TEXT or --prompts FILE"),
    (("--prompt", "x", "--policy", "nowhere"), "which is in none of the folders searched"),
    (("--prompt", "x", "--lora", "nowhere.safetensors"), "--lora: found nowhere.safetensors, which is not a file"),
    (("--prompt", "x", "--width", "60"), "found 60x64 pixels, accepted: multiples of 8"),
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
