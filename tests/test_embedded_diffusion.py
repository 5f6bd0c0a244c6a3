"""The embedded diffusion policy: small, with no second copy of what the flow policy has, and a base that draws what is asked in part."""

import numpy as np
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.embedded import DIFFUSION, POLICY, shapes
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.runs.prompt_cache import encode

SIZE = Size(64, 64)


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded_diffusion")


def test_it_is_offered_and_small(policy):
    assert "embedded_diffusion" in policies.available() and policies.problem("embedded_diffusion") is None
    assert sum(path.stat().st_size for path in DIFFUSION.rglob("*") if path.is_file()) <= 4 * 2**20
    assert not (DIFFUSION / "vae").exists() and not (DIFFUSION / "text_encoder").exists()


def test_its_vae_and_text_encoder_are_the_flows(policy):
    flow = policies.load("embedded")
    for part in ("vae", "text_encoder"):
        ours, theirs = (getattr(p.pipeline, part).state_dict() for p in (policy, flow))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (POLICY / "tokenizer").is_dir() and policy.pipeline.tokenizer.get_vocab() == flow.pipeline.tokenizer.get_vocab()


def test_it_draws_what_is_asked_in_part(policy):
    captions = tuple(shapes.splits()["validation"][:48])
    request = Request(captions, 1, policy.latent_shape(SIZE), seed=5, iteration=0, shared_noise=False, micro_batch=16)
    plan = SamplingPlan(policy.time_grid(12, 0.0, SIZE), "ddim", 0.0, 2.0, SIZE)
    pictures = sample(policy, request, encode(policy, captions, SIZE), plan, ("base", 0)).pictures.numpy()
    asked = np.mean([shapes.agreement(picture, caption) for picture, caption in zip(pictures, captions)])
    others = np.mean([shapes.agreement(picture, caption) for picture, caption in zip(pictures, captions[1:] + captions[:1])])
    assert asked > others + 0.15  # follows its captions
    assert asked < 0.9  # and leaves something to learn
