"""What Stable Diffusion has of its own: time grids of other schedulers' configurations, v prediction at zero signal, SDXL's empty prompt."""

import numpy as np
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.protocol import Conditioning, SamplingPlan, Size
from comfy_dancegrpo.grpo.rollout import Request, initial_noise, sample
from comfy_dancegrpo.lora.layouts import kohya
from comfy_dancegrpo.policies.stable_diffusion import StableDiffusion, StableDiffusionXL
from comfy_dancegrpo.runs.draw import draw
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from families import PROMPTS, Drawing
from families.stable_diffusion import BETAS, by_ddim, sd, sd15, sdxl, unet

SIZE = Size(64, 64)


def policy(scheduler):
    return StableDiffusion("tiny", sd(scheduler), torch.float32)


def alpha_bars():
    """Of Stable Diffusion's betas, in float64 (arXiv 2112.10752, as its configuration says: the square of a line of square roots)."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)


@pytest.mark.parametrize("scheduler, timesteps, last", [
    (PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False), [751, 501, 251, 1], alpha_bars()[0]),
    (EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1), [751, 501, 251, 1], 1.0),
    (DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1), [999, 749, 499, 249], 1.0),
    (DDIMScheduler(**BETAS, timestep_spacing="linspace", steps_offset=1, clip_sample=False), [999, 666, 333, 0], 1.0),
], ids=["pndm", "euler", "dpm", "linspace"])
def test_the_time_grid_is_that_of_the_configuration(scheduler, timesteps, last):
    grid = policy(scheduler).time_grid(4, 0.0, SIZE)
    assert grid.timesteps.tolist() == timesteps
    assert grid.levels.numpy() == pytest.approx(np.append(alpha_bars()[timesteps], last), rel=1e-4)


def test_a_flows_shift_is_without_meaning_and_too_many_steps_are_refused():
    tiny = policy(PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True))
    assert torch.equal(tiny.time_grid(4, 3.0, SIZE).levels, tiny.time_grid(4, 0.0, SIZE).levels)
    for steps in (1000, 1001):  # 1000: the offset leads beyond the last timestep
        with pytest.raises(RunError, match=f'^input "steps": found {steps}, accepted: fewer than the 1000 timesteps of the model$'):
            tiny.time_grid(steps, 0.0, SIZE)
    assert tiny.time_grid(999, 0.0, SIZE).steps == 999


def test_zero_terminal_signal_gives_the_pipelines_picture():
    options = {**BETAS, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1}
    tiny = policy(DDIMScheduler(**options, prediction_type="v_prediction"))
    grid = tiny.time_grid(4, 0.0, SIZE)
    assert grid.levels[0] == 2.0**-24 and (grid.levels.diff() > 0).all()
    request = Request(PROMPTS, 1, tiny.latent_shape(SIZE), seed=1, iteration=0, shared_noise=False, micro_batch=2)
    found = sample(tiny, request, tiny.condition(list(PROMPTS), SIZE), SamplingPlan(grid, "ddim", 0.0, 4.0, SIZE), ("run", 0)).pictures
    expected = by_ddim(tiny.pipeline, Drawing(PROMPTS, initial_noise(request, torch.arange(2)), SIZE, 4, 4.0))
    assert np.abs(found.numpy() - expected).max() < 2e-3  # 2^-12 of the noise is taken for picture at the first step
    with pytest.raises(RunError, match="found zero terminal signal .* with the prediction type epsilon, .*; accepted with it: v_prediction$"):
        policy(DDIMScheduler(**options))


def test_models_that_cannot_be_sampled_so_are_refused():
    with pytest.raises(RunError, match="found the prediction type 'sample' in its scheduler, accepted: epsilon and v_prediction$"):
        policy(DDIMScheduler(**BETAS, prediction_type="sample", steps_offset=1, clip_sample=False))
    distilled = sd(DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False))
    distilled.unet = unet(time_cond_proj_dim=8)
    with pytest.raises(RunError, match="distilled to take guidance as an input .*, accepted: one guided by a second call$"):
        StableDiffusion("tiny", distilled, torch.float32)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_sdxl(zeros):
    tiny = StableDiffusionXL("tiny", sdxl(zeros), torch.float32)
    embeds, negative, pooled, negative_pooled = tiny.pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=True)
    conditioning = tiny.condition(list(PROMPTS), SIZE)
    assert isinstance(conditioning, Conditioning) and negative.any() != zeros
    for side, expected in ((conditioning.positive, (embeds, pooled)), (conditioning.negative, (negative, negative_pooled))):
        assert torch.equal(side["embeds"], expected[0]) and torch.equal(side["pooled"], expected[1])


@pytest.mark.parametrize("family, build", [(StableDiffusion, sd15), (StableDiffusionXL, sdxl)])
def test_half_precision(family, build):
    """The VAE overflows there: our decode is in float32, and the pipeline's own drawing still finds the dtype that it expects."""
    half, seen = family("tiny", build().to(torch.float16), torch.float16), []
    hook = half.pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    latents = torch.randn(2, *half.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    whole = family("tiny", build(), torch.float32)
    with torch.inference_mode():  # as ComfyUI runs nodes
        decoded = half.decode(latents, None)
    torch.testing.assert_close(decoded, whole.decode(latents, None), atol=2e-3, rtol=0)
    assert seen == [torch.float32] and half.pipeline.vae.dtype == torch.float16
    hook.remove()
    drawn, exact = (next(draw(policy, PROMPTS[:1], SIZE, 3, 4.0, seed=1)) for policy in (half, whole))
    assert drawn.shape == (64, 64, 3) and (drawn - exact).abs().mean() < 0.02


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_is_drawn_as_it_is_trained(zeros):
    """Guided away from nothing or from the empty prompt, as its folder says; in a first-order scheduler without noise."""
    tiny = StableDiffusionXL("tiny", sdxl(zeros), torch.float32)
    tiny.pipeline.scheduler = DDIMScheduler.from_config(tiny.pipeline.scheduler.config, clip_sample=False)
    shape = tiny.latent_shape(SIZE)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(6))
    plan = SamplingPlan(tiny.time_grid(3, 0.0, SIZE), "ddim", 0.0, 6.0, SIZE)
    trained = sample(tiny, Request(PROMPTS[:1], 1, shape, 0, 0, micro_batch=1), tiny.condition([PROMPTS[0]], SIZE), plan, ("run", 0), initial=noise)
    drawn = next(draw(tiny, PROMPTS[:1], SIZE, 3, 6.0, seed=6))
    assert (drawn - trained.pictures[0]).abs().max() < 1e-5


def test_a_folder_with_a_safety_checker_is_known(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], '
        '"unet": ["diffusers", "UNet2DConditionModel"]}')
    assert policies._family(tmp_path) == ("stable_diffusion", "StableDiffusion")


def test_kohyas_names_are_those_of_every_module_and_lead_back():
    network = sdxl().unet
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    ours = {f"{name}.{ab}.weight": torch.zeros(1) for name, module in network.named_modules() if isinstance(module, kinds) for ab in ("lora_A", "lora_B")}
    file = kohya.to_file(ours)
    assert len(file) == len(ours) > 100 and kohya.from_file(file).keys() == ours.keys()
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn2_to_out_0.lora_up.weight" in file
    for odd in ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "lora_unet_input_blocks_4_1_proj_in.lora_up.weight",
                "lora_unet_down_blocks_0_resnets_0_conv1.alpha", "transformer.x.lora_A.weight"):
        with pytest.raises(KeyError, match=odd):
            kohya.from_file({odd: torch.zeros(1)})
