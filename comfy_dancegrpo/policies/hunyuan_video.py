"""HunyuanVideo (text to video, arXiv 2412.03603): a rectified flow with embedded guidance, in diffusers' `HunyuanVideoPipeline` layout.

Published settings for it (arXiv 2505.07818): 480x480 in 53 frames, 16 steps, shift 5, eta 0.25, guidance 6.018 (the model is told 1000 times
that), 24 samples a prompt of which 8 are trained, each from noise of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures

_ATTENTION = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FUSED = r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp)"  # one layer in the model's own names, so never in part
_FEED_FORWARD = r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.proj_out"
_MODULATION = r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear|single_transformer_blocks\.\d+\.norm\.linear"


class HunyuanVideo(Policy):
    pipeline_class = HunyuanVideoPipeline
    lora_layout = "hunyuan_video"
    lora_targets = {  # each with the attention: by its names diffusers tells this layout from its own
        "attention": f"{_ATTENTION}|{_FUSED}",
        "attention and feed-forward": f"{_ATTENTION}|{_FUSED}|{_FEED_FORWARD}",
        "all linear layers": f"{_ATTENTION}|{_FUSED}|{_FEED_FORWARD}|{_MODULATION}",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, pooled, mask = self.pipeline.encode_prompt(prompt=prompts, device=self.device)
        return {"embeds": embeds, "pooled": pooled, "mask": mask}

    def own_schedule(self, steps: int, size: Size):
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=self.device)
        return scheduler

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        spatial, temporal = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        multiple_of(size, spatial * self.denoiser.config.patch_size, temporal)
        channels = self.pipeline.vae.config.latent_channels
        return channels, (size.frames - 1) // temporal + 1, size.height // spatial, size.width // spatial

    def embedded_guidance(self, plan: SamplingPlan) -> float:
        return plan.guidance_scale

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        guidance = torch.full((len(latents),), self.embedded_guidance(plan), device=latents.device, dtype=self.dtype) * 1000.0
        return self.denoiser(
            hidden_states=latents.to(self.dtype), timestep=timesteps, guidance=guidance, encoder_hidden_states=tensors["embeds"],
            encoder_attention_mask=tensors["mask"], pooled_projections=tensors["pooled"], return_dict=False)[0]

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        return pictures(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0])
