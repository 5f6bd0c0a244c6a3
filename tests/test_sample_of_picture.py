"""Sampling by the pipeline of a family that edits: as the policy that was trained sees the reference, in the size that is asked for."""

import numpy as np
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.policies.flux import FluxKontext
from comfy_dancegrpo.policies.flux2 import Flux2
from comfy_dancegrpo.policies.ltx2 import LTX2
from comfy_dancegrpo.policies.stable_diffusion import StableDiffusion
from comfy_dancegrpo.policies.wan import Wan, WanImageToVideo
from comfy_dancegrpo.runs.draw import arguments, draw
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.workflow.host import Host, use
from families import PROMPTS, flux2, flux_kontext, ltx2, pictured, stable_diffusion, wan

SIZE = Size(64, 96)


@pytest.mark.parametrize("build", [flux_kontext.flux_kontext, flux2.klein])
def test_what_is_drawn_is_what_is_trained(build, tmp_path):
    build().save_pretrained(tmp_path / "diffusers" / "edit")
    with use(Host(models=tmp_path)):
        policy = policies.load("edit")
        prompt = pictured()[0]
        shape = policy.latent_shape(SIZE)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        plan = SamplingPlan(policy.time_grid(3, 0.0, SIZE), "ode", 0.0, 2.5, SIZE)
        trained = sample(policy, Request((prompt,), 1, shape, 0, 0, micro_batch=1), policy.condition([prompt], SIZE), plan, ("run", 0), initial=noise)
        drawn = policy.pipeline(**arguments(policy, prompt, SIZE, 3, 2.5), latents=noise, output_type="np").images
        assert np.abs(drawn - trained.pictures.numpy()).max() < 1e-5
        assert next(draw(policy, (prompt,), SIZE, 1, 2.5, seed=0)).shape == (64, 96, 3)


def test_a_first_frame_is_drawn_by_the_pipeline_that_takes_one():
    policy, size = Wan("tiny", wan.wan22_ti2v(), torch.float32), Size(64, 64, 5)
    plan = SamplingPlan(policy.time_grid(3, 0.0, size), "ode", 0.0, 2.5, size)
    wan.first_order(policy.pipeline)
    noise = torch.randn(1, *policy.latent_shape(size), generator=torch.Generator().manual_seed(4))
    request = Request(PROMPTS[:1], 1, policy.latent_shape(size), 0, 0, micro_batch=1)
    made = {}
    for prompt in (pictured()[0], PROMPTS[0]):
        trained = sample(policy, request, policy.condition([prompt], size), plan, ("run", 0), initial=noise).pictures[0]
        made[prompt] = next(draw(policy, (prompt,), size, 3, 2.5, seed=4))
        assert (made[prompt] - trained).abs().max() < 1e-5
    assert (made[pictured()[0]] - made[PROMPTS[0]]).abs().max() > 0.1


@pytest.mark.parametrize("make, sees", [
    (lambda: StableDiffusion("tiny", stable_diffusion.sd15(), torch.float32), False),
    (lambda: Wan("tiny", wan.wan21(), torch.float32), False),
    (lambda: Wan("tiny", wan.wan22_ti2v(), torch.float32), True),
    (lambda: FluxKontext("tiny", flux_kontext.flux_kontext(), torch.float32), True),
])
def test_a_policy_says_of_how_many_prompts_it_does_not_see_the_pictures(make, sees):
    policy = make()
    assert policy.unseen(PROMPTS) is None
    line = "'tiny' sees no pictures: those of 2 of 4 prompts are ignored, and their texts alone count"
    assert policy.unseen((*PROMPTS, *pictured())) == (None if sees else line)


@pytest.mark.parametrize("make", [lambda: Flux2("tiny", flux2.flux2(), torch.float32), lambda: LTX2("tiny", ltx2.ltx2(), torch.float32)])
def test_prompts_with_and_without_a_picture_do_not_go_together_where_the_model_takes_both(make):
    policy = make()
    policy.check(PROMPTS)
    policy.check(pictured())
    with pytest.raises(RunError, match="^found prompts with a picture beside prompts without, accepted: a picture for every prompt, or for none$"):
        policy.check((PROMPTS[0], pictured()[1]))


CANNOT = {
    "a picture that is not seen": (lambda: StableDiffusion("tiny", stable_diffusion.sd15(), torch.float32), pictured()[1],
                                   f"found the prompt {PROMPTS[1]!r} with a picture, accepted by 'tiny': prompts without, since it sees none"),
    "no picture, Kontext": (lambda: FluxKontext("tiny", flux_kontext.flux_kontext(), torch.float32), PROMPTS[1],
                            f"found the prompt {PROMPTS[1]!r} without a picture, accepted by 'tiny': prompts with one each"),
    "no picture, Wan": (lambda: WanImageToVideo("tiny", wan.wan22_i2v(), torch.float32), PROMPTS[1],
                        f"found the prompt {PROMPTS[1]!r} without a picture, accepted by 'tiny': prompts with one each"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_drawn_or_trained_is_said_before_anything_is_drawn(what, monkeypatch):
    make, prompt, line = CANNOT[what]
    policy, size = make(), Size(64, 64, 5 if "Wan" in what else 1)
    fitting = PROMPTS[0] if what.startswith("a picture") else pictured()[0]
    monkeypatch.setattr(policy, "condition", lambda *_: pytest.fail("one was encoded"))
    attempts = [lambda: next(draw(policy, (fitting, prompt), size, 1, 1.0, seed=0))]
    if policy.needs_picture:
        attempts.append(lambda: encode(policy, (fitting, prompt), size))
    for attempt in attempts:
        with pytest.raises(RunError) as error:
            attempt()
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
