"""FLUX.1 (dev, schnell) and FLUX.1 Kontext: rectified flows with embedded guidance, in diffusers' `FluxPipeline` and `FluxKontextPipeline` layouts.

Published settings for FLUX.1-dev (arXiv 2505.07818): 720x720, 16 steps, shift 3, eta 0.3, 12 samples a prompt. Kontext (arXiv 2506.15742): guidance
2.5, 28 steps at about 1024x1024.
"""

from __future__ import annotations

import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL.Image import Image
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures

_MODULATION = r"(norm|norm1|norm1_context)\.linear"
_BLOCKS = r"(transformer_blocks|single_transformer_blocks)\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"


class Flux(Policy):
    pipeline_class = FluxPipeline
    context_parallel = True
    lora_targets = {
        "attention": f"{_BLOCKS}({_ATTENTION})",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD}|{_MODULATION})",
        "modulation": f"{_BLOCKS}{_MODULATION}",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, **self.pipeline_options())
        return {"embeds": embeds, "pooled": pooled, "text_ids": text_ids.expand(len(prompts), *text_ids.shape)}

    def pipeline_options(self) -> dict:
        # the T5 tokenizer knows the length that the model was trained on (512 for FLUX.1-dev, 16 for the embedded policy)
        return {"max_sequence_length": min(self.pipeline.tokenizer_2.model_max_length, 512)}

    def own_schedule(self, steps: int, size: Size):
        return self.schedule_by_tokens(steps, self.latent_shape(size)[0])

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
        sequence, ids = self._sequence(latents, tensors, plan)
        return self.denoiser(
            hidden_states=sequence.to(self.dtype), timestep=timesteps.to(self.dtype) / 1000, guidance=guidance, img_ids=ids,
            encoder_hidden_states=tensors["embeds"], pooled_projections=tensors["pooled"], txt_ids=tensors["text_ids"][0], return_dict=False,
        )[0][:, :latents.shape[1]]

    def _sequence(self, latents: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> tuple[Tensor, Tensor]:
        """All image tokens that the model sees, those of the latents first, [B, S, C], and where each is, [S, 3]."""
        return latents, self.pipeline._prepare_latent_image_ids(1, *self._patches(plan.size), self.device, self.dtype)

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(latents.to(vae.dtype), plan.size.height, plan.size.width, self.pipeline.vae_scale_factor)
        return pictures(vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0])


class FluxKontext(Flux):
    """The tokens of a reference picture beside those that are drawn. It is seen in the size of what is drawn, whatever its own."""

    pipeline_class = FluxKontextPipeline
    needs_picture = True

    def picture(self, prompt: str, size: Size) -> Image:
        return self.pipeline.image_processor.resize(super().picture(prompt, size), size.height, size.width)

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        latents = torch.cat([self._reference(prompt, size) for prompt in prompts])
        return {**super().encode(prompts, size), "reference": self.pipeline._pack_latents(latents, *latents.shape)}

    def _reference(self, prompt: str, size: Size) -> Tensor:
        """Latents of the prompt's picture, [1, C, h, w]."""
        pixels = self.pipeline.image_processor.preprocess(self.picture(prompt, size), size.height, size.width).to(self.device, self.pipeline.vae.dtype)
        return self.pipeline._encode_vae_image(pixels, generator=None).to(self.dtype)

    def _sequence(self, latents: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> tuple[Tensor, Tensor]:
        drawn, ids = super()._sequence(latents, tensors, plan)
        given = ids.clone()
        given[..., 0] = 1
        return torch.cat([drawn, tensors["reference"].to(drawn.dtype)], 1), torch.cat([ids, given])
