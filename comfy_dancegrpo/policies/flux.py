"""FLUX.1 (dev, schnell): a rectified flow with embedded guidance, in diffusers' `FluxPipeline` layout."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures

_MODULATION = r"(norm|norm1|norm1_context)\.linear"
_BLOCKS = r"(transformer_blocks|single_transformer_blocks)\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"


class Flux(Policy):
    pipeline_class = FluxPipeline
    lora_targets = {
        "attention": f"{_BLOCKS}({_ATTENTION})",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD}|{_MODULATION})",
        "modulation": f"{_BLOCKS}{_MODULATION}",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        # the T5 tokenizer knows the length that the model was trained on (512 for FLUX.1-dev, 16 for the embedded policy)
        length = min(self.pipeline.tokenizer_2.model_max_length, 512)
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=length)
        return {"embeds": embeds, "pooled": pooled, "text_ids": text_ids.expand(len(prompts), *text_ids.shape)}

    def own_schedule(self, steps: int, size: Size):
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(self.latent_shape(size)[0], *(scheduler.config.get(k, v) for k, v in defaults.items()))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=self.device)
        return scheduler

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        rows, columns = self._patches(size)
        return rows * columns, self.pipeline.vae.config.latent_channels * 4

    def _patches(self, size: Size) -> tuple[int, int]:
        """Rows and columns of 2x2 latent patches."""
        patch = self.pipeline.vae_scale_factor * 2
        multiple_of(size, patch)
        return size.height // patch, size.width // patch

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((len(latents),), plan.guidance_scale, device=latents.device, dtype=torch.float32)
        return self.denoiser(
            hidden_states=latents.to(self.dtype), timestep=timesteps.to(self.dtype) / 1000, guidance=guidance,
            encoder_hidden_states=tensors["embeds"], pooled_projections=tensors["pooled"], txt_ids=tensors["text_ids"][0],
            img_ids=self.pipeline._prepare_latent_image_ids(1, *self._patches(plan.size), self.device, self.dtype), return_dict=False,
        )[0]

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(latents.to(vae.dtype), plan.size.height, plan.size.width, self.pipeline.vae_scale_factor)
        return pictures(vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0])
