"""LTX-Video (arXiv 2501.00103): rectified flows of text to video and of a first frame to video, with classifier-free guidance.

In diffusers' `LTXPipeline` and `LTXImageToVideoPipeline` layouts, whose defaults are 512x704 in 161 frames at 25 a second, 50 steps, guidance 3.
The shift grows with the number of tokens.
"""

from __future__ import annotations

import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from PIL.Image import Image
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures

FRAME_RATE = 25  # a second: the pipelines' default
_BLOCKS = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"ff\.net\.(0\.proj|2)"
_ENDS = r"caption_projection\.linear_[12]|proj_out"  # of the others the names differ, and diffusers does not translate them


class LTX(Policy):
    pipeline_class = LTXPipeline
    classifier_free = True
    lora_layout = "ltx"
    lora_targets = {
        "attention": f"{_BLOCKS}{_ATTENTION}",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})|{_ENDS}",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(list(map(str, prompts)), do_classifier_free_guidance=False, device=self.device)
        return {"embeds": embeds, "mask": mask}

    def own_schedule(self, steps: int, size: Size):
        return self.schedule_by_tokens(steps, self.latent_shape(size)[0])

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        frames, rows, columns = self._grid(size)
        return frames * rows * columns, self.denoiser.config.in_channels

    def _grid(self, size: Size) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        spatial, temporal = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        multiple_of(size, spatial, temporal)
        return (size.frames - 1) // temporal + 1, size.height // spatial, size.width // spatial

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        """timesteps may be [B, S], one for each token."""
        frames, rows, columns = self._grid(plan.size)
        spatial, temporal = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        return self.denoiser(
            hidden_states=latents.to(self.dtype), timestep=timesteps, encoder_hidden_states=tensors["embeds"],
            encoder_attention_mask=tensors["mask"], num_frames=frames, height=rows, width=columns,
            rope_interpolation_scale=(temporal / FRAME_RATE, spatial, spatial), return_dict=False)[0]

    def _first(self, prompt: str, picture: Image, size: Size) -> Tensor:
        """Tokens of the prompt's first frame, [1, S, C] float32: the mean of what the VAE says of it, where the pipeline of LTX-Video draws a sample."""
        vae = self.pipeline.vae
        pixels = self.pipeline_for(prompt).video_processor.preprocess(picture, height=size.height, width=size.width)
        found = vae.encode(pixels[:, :, None].to(self.device, vae.dtype)).latent_dist.mode().float()
        return self.pipeline._pack_latents(self.pipeline._normalize_latents(found, vae.latents_mean, vae.latents_std))

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(latents, *self._grid(plan.size))
        video = self.pipeline._denormalize_latents(unpacked, vae.latents_mean, vae.latents_std, vae.config.scaling_factor).to(vae.dtype)
        if not vae.config.timestep_conditioning:
            return pictures(vae.decode(video, return_dict=False)[0])
        # decoders since 0.9.1 are told of noise that is left; one by one here, for diffusers' slicing takes the wrong rows with it
        return pictures(torch.cat([vae.decode(one, one.new_zeros(1), return_dict=False)[0] for one in video.split(1)]))


class LTXImageToVideo(LTX):
    """A picture as the first frame: its tokens stand there without noise, and are told so by a timestep of 0."""

    pipeline_class = LTXImageToVideoPipeline
    needs_picture = True

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        return {**super().encode(prompts, size), "first": torch.cat([self._first(prompt, self.picture(prompt, size), size) for prompt in prompts])}

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        first = tensors["first"].to(latents.dtype)
        velocity = super().denoise(*beginning_with(first, latents, timesteps), tensors, plan)
        return straight_to(first, latents, velocity, plan.grid.levels_at(timesteps))


def beginning_with(first: Tensor, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, S, C] with the given ones in front, without noise, and a timestep for each token, [B, S]: 0 for these."""
    given = first.shape[1]
    each = timesteps[:, None].repeat(1, latents.shape[1])
    each[:, :given] = 0
    return torch.cat([first, latents[:, given:]], 1), each


def straight_to(first: Tensor, latents: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """The velocity, in which the given tokens go straight to the picture, whatever the model says of them: nothing is learned from them."""
    given = first.shape[1]
    return torch.cat([(latents[:, :given] - first) / sigmas.view(-1, 1, 1), velocity[:, given:].to(latents.dtype)], 1)
