"""FLUX.2 (dev and klein): rectified flows of text to picture, and of a reference picture to another, in diffusers' layouts.

`Flux2Pipeline` (dev): guidance is an input of the model; 1024x1024, 50 steps, guidance 4. `Flux2KleinPipeline` (klein): guidance by a second call
(guidance 4, 50 steps), and none in the distilled models (4 steps). The shift depends on the number of tokens and of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer

from ..errors import RunError
from ..grpo.protocol import SamplingPlan, Size
from .base import MIXED, Policy, all_or_none, multiple_of, pictures

_DOUBLE, _SINGLE = r"transformer_blocks\.\d+\.", r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.linear_(in|out)"


class Flux2(Policy):
    pipeline_class = Flux2Pipeline
    context_parallel = True
    lora_targets = {  # in its single blocks attention and feed-forward are one layer
        "attention": f"{_DOUBLE}{_ATTENTION}|{_SINGLE}",
        "attention and feed-forward": f"{_DOUBLE}({_ATTENTION}|{_FEED_FORWARD})|{_SINGLE}",
    }

    @classmethod
    def load(cls, name: str, folder: Path, dtype: str, **components) -> Policy:
        """As published the tokenizer is wrapped in a processor of pictures, which needs torchvision; prompts need the tokenizer alone."""
        policy = super().load(name, folder, dtype, **components, tokenizer=None)
        policy.pipeline.register_modules(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
        return policy

    def check(self, prompts: Sequence[str]) -> None:
        super().check(prompts)
        all_or_none(prompts)

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        """reference: [P, S, C] tokens of the prompts' pictures, seen in the size of what is drawn, or none. pictured: [P], 1 where there is one."""
        embeds, text_ids = self.pipeline.encode_prompt(list(map(str, prompts)), device=self.device)
        self.check(prompts)
        found = [getattr(prompt, "picture", None) is not None for prompt in prompts]
        tokens = [self._reference(prompt, size) for prompt in prompts] if all(found) else [embeds.new_zeros(len(prompts), 0, self.latent_shape(size)[0])]
        return {"embeds": embeds, "text_ids": text_ids, "reference": torch.cat(tokens), "pictured": torch.tensor(found, device=self.device)}

    def picture(self, prompt: str, size: Size) -> Image:
        return self.pipeline.image_processor.resize(super().picture(prompt, size), size.height, size.width)

    def _reference(self, prompt: str, size: Size) -> Tensor:
        pixels = self.pipeline.image_processor.preprocess(self.picture(prompt, size), height=size.height, width=size.width)
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.pipeline.vae.dtype), generator=None)
        return self.pipeline._pack_latents(latents).to(self.dtype)

    def own_schedule(self, steps: int, size: Size):
        _, rows, columns = self.latent_shape(size)
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        mu = compute_empirical_mu(image_seq_len=rows * columns, num_steps=steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=self.device)
        return scheduler

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Channels of 2x2 latents, rows and columns."""
        patch = self.pipeline.vae_scale_factor * 2
        multiple_of(size, patch)
        return self.denoiser.config.in_channels, size.height // patch, size.width // patch

    def embedded_guidance(self, count: int, plan: SamplingPlan) -> Tensor | None:
        return torch.full((count,), plan.guidance_scale, device=self.device, dtype=torch.float32)

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        tokens, ids = self.pipeline._pack_latents(latents), self.pipeline._prepare_latent_ids(latents[:1]).to(self.device)
        count = tokens.shape[1]
        if tensors["pictured"].any():
            if not tensors["pictured"].all():
                raise RunError(MIXED)
            tokens = torch.cat([tokens, tensors["reference"].to(tokens.dtype)], 1)
            ids = torch.cat([ids, self.pipeline._prepare_image_ids([latents[:1]]).to(self.device)], 1)
        velocity = self.denoiser(
            hidden_states=tokens.to(self.dtype), timestep=timesteps.to(self.dtype) / 1000, guidance=self.embedded_guidance(len(latents), plan),
            encoder_hidden_states=tensors["embeds"], txt_ids=tensors["text_ids"], img_ids=ids, return_dict=False)[0][:, :count]
        return velocity.mT.reshape(latents.shape)

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (moment.view(1, -1, 1, 1).to(latents.device, latents.dtype) for moment in (vae.bn.running_mean, vae.bn.running_var))
        whole = self.pipeline._unpatchify_latents(latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean)
        return pictures(vae.decode(whole.to(vae.dtype), return_dict=False)[0])


class Flux2Klein(Flux2):
    pipeline_class = Flux2KleinPipeline

    def __init__(self, name: str, pipeline, dtype: torch.dtype):
        super().__init__(name, pipeline, dtype)
        self.classifier_free = not pipeline.config.is_distilled

    def embedded_guidance(self, count: int, plan: SamplingPlan) -> Tensor | None:
        return None
