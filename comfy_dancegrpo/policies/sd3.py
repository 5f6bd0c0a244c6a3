"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): rectified flows with classifier-free guidance, in diffusers' `StableDiffusion3Pipeline` layout.

Published for 3.5 medium (Flow-GRPO, arXiv 2505.05470): 512x512, guidance 4.5, 10 steps in training and 40 in evaluation.
"""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, dynamic_shift, multiple_of, pictures

_BLOCKS = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"
_MODULATION = r"(norm1|norm1_context)\.linear"


class StableDiffusion3(Policy):
    pipeline_class = StableDiffusion3Pipeline
    classifier_free = True
    may_lack = ("text_encoder_3", "tokenizer_3")
    lora_targets = {
        "attention": f"{_BLOCKS}{_ATTENTION}",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD}|{_MODULATION})",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=False, **self.pipeline_options())
        return {"embeds": embeds, "pooled": pooled}

    def pipeline_options(self) -> dict:
        tokenizer = self.pipeline.tokenizer_3  # None of a folder without T5: the pipeline has zeros for its embeddings
        return {} if tokenizer is None else {"max_sequence_length": min(tokenizer.model_max_length, 256)}  # the pipeline's, where the tokenizer has no less

    def own_schedule(self, steps: int, size: Size):
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        _, height, width = self.latent_shape(size)
        tokens = height * width // self.pipeline.patch_size**2
        mu = dynamic_shift(scheduler, tokens, max_shift=1.16) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(steps, device=self.device, mu=mu)
        return scheduler

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        scale, config = self.pipeline.vae_scale_factor, self.denoiser.config
        patch = scale * config.patch_size
        multiple_of(size, patch)
        if max(size.height, size.width) > (limit := config.pos_embed_max_size * patch):
            raise ValueError(f"found {size}, accepted: multiples of {patch} up to {limit}")
        return config.in_channels, size.height // scale, size.width // scale

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        return self.denoiser(hidden_states=latents.to(self.dtype), timestep=timesteps, encoder_hidden_states=tensors["embeds"],
                             pooled_projections=tensors["pooled"], return_dict=False)[0]

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        return pictures(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0])
