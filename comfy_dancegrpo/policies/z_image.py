"""Z-Image and Z-Image-Turbo (arXiv 2511.22699): a rectified flow of one stream, in diffusers' `ZImagePipeline` layout.

Published: 1024x1024; the base model 50 steps and guidance 5, Turbo (distilled) 8 steps and guidance 0, which is none: the scale is
what this pipeline adds of the difference, one less than in other families.
"""

from __future__ import annotations

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures

_BLOCKS = r"(layers|noise_refiner|context_refiner)\.\d+\."
_ATTENTION = r"attention\.(to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"feed_forward\.w[123]"
_MODULATION = r"adaLN_modulation\.0"


class ZImage(Policy):
    pipeline_class = ZImagePipeline
    classifier_free = True
    lora_targets = {
        "attention": f"{_BLOCKS}{_ATTENTION}",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD}|{_MODULATION})",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        # a copy: the pipeline writes into the list
        texts, _ = self.pipeline.encode_prompt(prompt=list(prompts), device=self.device, do_classifier_free_guidance=False)
        return {"embeds": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), "length": torch.tensor([len(text) for text in texts])}

    def own_schedule(self, steps: int, size: Size):
        _, height, width = self.latent_shape(size)
        return self.schedule_by_tokens(steps, (height // 2) * (width // 2))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        multiple_of(size, scale * 2)
        return self.denoiser.in_channels, size.height // scale, size.width // scale

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        # a call for each sample: the model pads texts to the longest of a batch, which would round differently with other neighbours
        rows = zip(latents.to(self.dtype), (1000 - timesteps) / 1000, tensors["embeds"], tensors["length"].tolist(), strict=True)
        return -torch.stack([self.denoiser([x[:, None]], t[None], [text[:length]], return_dict=False)[0][0][:, 0]
                             for x, t, text, length in rows])

    def guided(self, plan: SamplingPlan) -> bool:
        return plan.guidance_scale > 0

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return super().guide(positive, negative, scale + 1)

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        return pictures(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0])
