"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752) and SDXL (arXiv 2307.01952): latent diffusion with classifier-free guidance.

DanceGRPO's settings of Stable Diffusion (arXiv 2505.07818): 512x512, 50 steps, eta 1, guidance_scale 5, all transitions trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from .. import processes
from ..errors import RunError
from ..grpo.protocol import SamplingPlan, Size, TimeGrid
from .base import Policy, multiple_of, pictures

_TRANSFORMER = r".*attentions\.\d+\."
_ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"
_TIME = r".*resnets\.\d+\.time_emb_proj"


class StableDiffusion(Policy):
    """Of 1.x and 2.x. Sampled by DDIM whatever the folder's scheduler, on the betas, timesteps and prediction type of its configuration."""

    process = "diffusion"
    classifier_free = True
    lora_layout = "kohya"
    pipeline_class = StableDiffusionPipeline
    load_options = {"safety_checker": None, "requires_safety_checker": False}
    # the embeddings of time and of size are left out: only newer loaders know kohya's names for them
    lora_targets = {
        "attention": f"{_TRANSFORMER}{_ATTENTION}",
        "attention and feed-forward": f"{_TRANSFORMER}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_TRANSFORMER}({_ATTENTION}|{_FEED_FORWARD}|proj_in|proj_out)|{_TIME}",
        "modulation": rf"{_TRANSFORMER}transformer_blocks\.\d+\.attn2\.(to_k|to_v)|{_TIME}",  # where text and time come in
    }

    def __init__(self, name: str, pipeline, dtype: torch.dtype):
        super().__init__(name, pipeline, dtype)
        self._scheduler = _ddim(pipeline.scheduler)
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise RunError('input "policy": found a UNet distilled to take guidance as an input (LCM), accepted: one guided by a second call')

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipeline.unet

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"embeds": embeds}

    def time_grid(self, steps: int, shift: float, size: Size) -> TimeGrid:
        """As the scheduler's configuration says (spacing, offset, betas, last alpha). shift: a flow's, without meaning here.

        Raises `RunError` for more steps than the model has timesteps.
        """
        trained, alphas = self._scheduler.config.num_train_timesteps, self._scheduler.alphas_cumprod
        if steps >= trained:  # at as many, "leading" timesteps with an offset go beyond the last
            raise RunError(f'input "steps": found {steps}, accepted: fewer than the {trained} timesteps of the model')
        self._scheduler.set_timesteps(steps)
        timesteps = self._scheduler.timesteps
        levels = torch.cat([alphas[timesteps], self._scheduler.final_alpha_cumprod.reshape(1)])
        return TimeGrid(levels=levels.to(self.device), timesteps=timesteps.to(self.device))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        multiple_of(size, max(factor, 8))  # 8: diffusers' pipelines take no other
        return self.denoiser.config.in_channels, size.height // factor, size.width // factor

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        output = self.denoiser(latents.to(self.dtype), timesteps, encoder_hidden_states=tensors["embeds"],
                               added_cond_kwargs=self._added(tensors, plan.size), return_dict=False)[0].to(latents.dtype)
        if self._scheduler.config.prediction_type == "epsilon":
            return output
        alpha_bar = self._scheduler.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents  # from v (arXiv 2202.00512, appendix D)

    def _added(self, tensors: dict[str, Tensor], size: Size) -> dict[str, Tensor] | None:
        """What the UNet is told beside the prompt: for SDXL the pooled prompt and the size."""
        return None

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:  # some finetunes of SDXL
            mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
            scaled = latents * std / vae.config.scaling_factor + mean
        else:
            scaled = latents / vae.config.scaling_factor
        with self._exact(vae):
            return pictures(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])

    @contextlib.contextmanager
    def _exact(self, vae: torch.nn.Module) -> Iterator[None]:
        """In float32 while the block runs where it overflows in float16 (SDXL's); not for longer, since the pipelines expect their own dtype."""
        own = vae.dtype
        with processes.outside_inference_mode():
            if upcast := own == torch.float16 and vae.config.force_upcast:
                vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                with processes.outside_inference_mode():
                    vae.to(own)


class StableDiffusionXL(StableDiffusion):
    """With two text encoders; the UNet is told the pooled prompt, and the size as that of an uncropped original."""

    pipeline_class = StableDiffusionXLPipeline
    load_options = {"add_watermarker": False}

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"embeds": embeds, "pooled": pooled}

    def encode_negative(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        tensors = super().encode_negative(prompts, size)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in tensors.items()}
        return tensors

    def pipeline_options(self) -> dict:
        return {"negative_prompt": None} if self.pipeline.config.force_zeros_for_empty_prompt else {}  # it encodes any text, "" too

    def _added(self, tensors: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        pixels, pooled = (size.height, size.width), tensors["pooled"]
        ids = self.pipeline._get_add_time_ids(pixels, (0, 0), pixels, dtype=self.dtype, text_encoder_projection_dim=pooled.shape[-1])
        return {"text_embeds": pooled, "time_ids": ids.to(self.device).expand(len(pooled), -1)}


def _ddim(scheduler) -> DDIMScheduler:
    """A DDIM scheduler of another's configuration (PNDM, Euler, DPM-Solver …). Raises `RunError` where a model cannot be sampled with it.

    With zero terminal signal (arXiv 2305.08891) the first alpha_bar is 2^-24 in place of 0, as in diffusers' Euler scheduler: epsilon
    then tells the picture still, which at 0 it does not.
    """
    ddim = DDIMScheduler.from_config(scheduler.config)
    kind = ddim.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise RunError(f'input "policy": found the prediction type {kind!r} in its scheduler, accepted: epsilon and v_prediction')
    if ddim.config.rescale_betas_zero_snr:
        if kind == "epsilon":
            raise RunError('input "policy": found zero terminal signal (rescale_betas_zero_snr) with the prediction type epsilon, which says '
                           "nothing of the picture there, in its scheduler; accepted with it: v_prediction")
        ddim.alphas_cumprod[-1] = 2.0**-24
    return ddim
