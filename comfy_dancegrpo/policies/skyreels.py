"""SkyReels-V1 (image to video, in HunyuanVideo's layout): a rectified flow with classifier-free guidance, as `HunyuanSkyreelsImageToVideoPipeline`.

Published settings for it (arXiv 2505.07818): 400x640 in 53 frames, shift 7, eta 0.3, guidance 5, 8 samples a prompt.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanSkyreelsImageToVideoPipeline
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import reference
from .hunyuan_video import HunyuanVideo


class SkyReels(HunyuanVideo):
    """The latents of the first frame, and of none after it, stand beside the noise as channels of their own."""

    pipeline_class = HunyuanSkyreelsImageToVideoPipeline
    needs_picture = True
    classifier_free = True

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        return {**super().encode(prompts, size), "first": torch.cat([self._first(prompt, size) for prompt in prompts])}

    def _first(self, prompt: str, size: Size) -> Tensor:
        """Latents of the prompt's picture, [1, C, 1, h, w]: the mean of what the VAE says of it, where the pipeline draws a sample."""
        pixels = self.pipeline.video_processor.preprocess(reference(prompt, self.name), height=size.height, width=size.width)
        found = self.pipeline.vae.encode(pixels[:, :, None].to(self.device, self.pipeline.vae.dtype)).latent_dist.mode()
        return (found * self.pipeline.vae_scaling_factor).to(self.dtype)

    def embedded_guidance(self, plan: SamplingPlan) -> float:
        return 1.0

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        first = torch.zeros_like(latents)
        first[:, :, :1] = tensors["first"]
        return super().denoise(torch.cat([latents, first], 1), timesteps, tensors, plan)
