"""LTX-2 (arXiv 2601.03233): a rectified flow of text to video and sound in one, in diffusers' `LTX2Pipeline` layout; a prompt's picture is
the first frame, as in `LTX2ImageToVideoPipeline`.

Its sound is sampled and trained along with the video, and not decoded: rewards see the video. Guidance is classifier-free alone, on both alike; the
pipeline can add to it two more calls of the model (for skipped blocks, and for each of the two alone) and a rescale, which are left out here.
Its defaults are 512x768 in 121 frames at 24 a second, 30 steps, guidance 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from diffusers.pipelines.ltx2 import utils
from PIL.Image import Image, fromarray
from torch import Tensor

from ..grpo.protocol import SamplingPlan, Size
from .base import all_or_none
from .ltx import LTX, beginning_with, straight_to

FRAME_RATE = 24.0  # a second: the pipeline's default
_LENGTH = 1024  # of a prompt in tokens, at most: the pipeline's default
_BLOCKS = r"transformer_blocks\.\d+\."
_ATTENTION = r"(attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)\.(to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"(ff|audio_ff)\.net\.(0\.proj|2)"


class LTX2(LTX):
    """Latents are one row: the tokens of the video, then those of the sound."""

    pipeline_class = LTX2Pipeline
    lora_targets = {
        "attention": f"{_BLOCKS}{_ATTENTION}",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
    }

    def pipeline_options(self) -> dict[str, Any]:
        alone = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
        return {**alone, **{f"audio_{name}": value for name, value in alone.items()}, "audio_guidance_scale": None}  # None: as the video's

    def check(self, prompts: Sequence[str]) -> None:
        super().check(prompts)
        all_or_none(prompts)

    def pipeline_for(self, prompt: str):
        if getattr(prompt, "picture", None) is None:
            return self.pipeline
        other = LTX2ImageToVideoPipeline(**self.pipeline.components)
        other.set_progress_bar_config(disable=True)
        return other

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        """first: [P, S, C], the tokens of the prompts' pictures; absent where they have none."""
        self.check(prompts)
        pipeline = self.pipeline
        length = min(pipeline.tokenizer_max_length, _LENGTH)
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(map(str, prompts)), do_classifier_free_guidance=False, max_sequence_length=length, device=self.device)
        video, audio, mask = pipeline.connectors(embeds, mask, padding_side=pipeline.tokenizer.padding_side)
        tensors = {"video": video, "audio": audio, "mask": mask}
        if getattr(prompts[0], "picture", None) is not None:
            tensors["first"] = torch.cat([self._first(prompt, self._compressed(self.picture(prompt, size)), size) for prompt in prompts])
        return tensors

    def _compressed(self, picture: Image) -> Image:
        """As the pipeline compresses first frames before it encodes them, like those the model was trained on; older ones do not."""
        if not hasattr(utils, "apply_image_conditioning_crf"):
            return picture
        return fromarray(utils.apply_image_conditioning_crf(np.array(picture), utils.resolve_default_image_crf(self.pipeline.text_encoder)))

    def own_schedule(self, steps: int, size: Size):
        return self.schedule_by_tokens(steps, math.prod(self._grid(size)))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        config = self.denoiser.config
        return (math.prod(self._grid(size)) * config.in_channels + self._sounds(size) * config.audio_in_channels,)

    def _sounds(self, size: Size) -> int:
        """Tokens of the sound: as long as the video."""
        p = self.pipeline
        return round(size.frames / FRAME_RATE * (p.audio_sampling_rate / p.audio_hop_length / p.audio_vae_temporal_compression_ratio))

    def split(self, latents: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """The tokens of the video [B, S, C], and of the sound."""
        config, tokens = self.denoiser.config, math.prod(self._grid(size))
        video, audio = latents.split([tokens * config.in_channels, self._sounds(size) * config.audio_in_channels], 1)
        return video.unflatten(1, (tokens, -1)), audio.unflatten(1, (self._sounds(size), -1))

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        video, audio = self.split(latents, plan.size)
        first, tokens, each = tensors.get("first"), video, timesteps
        if first is not None:
            first = first.to(latents.dtype)
            tokens, each = beginning_with(first, video, timesteps)
        frames, rows, columns = self._grid(plan.size)
        count, sounds = len(latents), audio.shape[1]
        velocities = self.denoiser(
            hidden_states=tokens.to(self.dtype), audio_hidden_states=audio.to(self.dtype),
            encoder_hidden_states=tensors["video"], audio_encoder_hidden_states=tensors["audio"],
            encoder_attention_mask=tensors["mask"], audio_encoder_attention_mask=tensors["mask"],
            timestep=each, audio_timestep=timesteps, sigma=timesteps,
            num_frames=frames, height=rows, width=columns, fps=FRAME_RATE, audio_num_frames=sounds,
            video_coords=self.denoiser.rope.prepare_video_coords(count, frames, rows, columns, latents.device, fps=FRAME_RATE),
            audio_coords=self.denoiser.audio_rope.prepare_audio_coords(count, sounds, latents.device),
            use_cross_timestep=True, return_dict=False)
        if first is not None:
            velocities = straight_to(first, video, velocities[0], plan.grid.levels_at(timesteps)), velocities[1].to(latents.dtype)
        return torch.cat([velocity.flatten(1) for velocity in velocities], 1)

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        return super().decode(self.split(latents, plan.size)[0], plan)
