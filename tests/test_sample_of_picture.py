"""Sampling by the pipeline of a family that edits: as the policy that was trained sees the reference, in the size that is asked for."""

import numpy as np
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.runs.draw import arguments, draw
from comfy_dancegrpo.workflow.host import Host, use
from families import flux2, flux_kontext, pictured

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
