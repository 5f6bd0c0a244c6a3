"""FLUX.2 beyond the table of the families."""

import json

import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.protocol import Conditioning, SamplingPlan, Size
from comfy_dancegrpo.runs import prompt_cache
from comfy_dancegrpo.workflow.host import Host, use
from families import PROMPTS, flux2, pictured

SIZE = Size(64, 64)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """As published: its tokenizer is that of a processor, of a class that cannot be made without torchvision."""
    models = tmp_path_factory.mktemp("models")
    folder = models / "diffusers" / "flux-2"
    flux2.flux2().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with use(Host(models=models)):
        return policies.load("flux-2")


def test_a_published_folder_needs_no_torchvision(policy):
    assert policy.condition([PROMPTS[0]], SIZE).tensors["embeds"].shape[:2] == (1, 512)


def test_pictures_for_some_of_the_prompts(policy):
    both = Conditioning.join([policy.condition([prompt], SIZE) for prompt in (PROMPTS[0], pictured()[1])])
    plan = SamplingPlan(policy.time_grid(2, 0.0, SIZE), size=SIZE)
    with pytest.raises(RunError, match="a picture for every prompt, or for none"):
        policy.predict(torch.zeros(2, *policy.latent_shape(SIZE)), plan.grid.timesteps, both, plan)
    with pytest.raises(RunError, match="a picture for every prompt, or for none"):
        policy.encode([PROMPTS[0], pictured()[1]], SIZE)


def test_pictures_for_some_of_a_calls_prompts_are_noticed_before_any_is_encoded(policy, monkeypatch):
    monkeypatch.setattr(policy, "condition", lambda *_: pytest.fail("one was encoded"))
    with pytest.raises(RunError, match="^found prompts with a picture beside prompts without, accepted: a picture for every prompt, or for none$"):
        prompt_cache.encode(policy, [PROMPTS[0], pictured()[1]], SIZE)
