"""Wan 2.1 and 2.2 (arXiv 2503.20314): rectified flows of video, or of one frame as a picture, with classifier-free guidance.

`WanPipeline`: text to video with Wan 2.1 (1.3B, 14B), with both experts of Wan 2.2 A14B, and with Wan 2.2 TI2V-5B, which takes a
first frame too. `WanImageToVideoPipeline`: a picture as the first frame, with Wan 2.1 I2V (and its CLIP vision encoder) and Wan 2.2.
Published settings: 480x832 or 720x1280 in 81 frames (TI2V-5B 704x1280 in 121), 50 steps, shift 3 or 5, guidance 5; DanceGRPO
trained Wan 2.1 at 512x512 in one frame, 20 steps, guidance 5. Wan 2.2 A14B: 40 steps, guidance 4, and 3 for its expert of low noise.
"""

from __future__ import annotations

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from .. import processes
from ..errors import RunError
from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures, reference

_BLOCKS = r"blocks\.\d+\."
_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)"
_FEED_FORWARD = r"ffn\.net\.(0\.proj|2)"
_EMBEDDERS = r"condition_embedder\.((time_embedder|text_embedder)\.linear_[12]|time_proj|image_embedder\.ff\.net\.(0\.proj|2))"
_LENGTH = 512  # of a prompt in tokens, as the model was trained; its attention to pictures counts on it


class Wan(Policy):
    pipeline_class = WanPipeline
    context_parallel = True
    classifier_free = True
    lora_layout = "wan"
    lora_targets = {
        "attention": f"{_BLOCKS}{_ATTENTION}",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})|{_EMBEDDERS}|proj_out",
    }

    def __init__(self, name: str, pipeline, dtype: torch.dtype):
        super().__init__(name, pipeline, dtype)
        ratio, steps = pipeline.config.boundary_ratio, pipeline.scheduler.config.num_train_timesteps
        self.boundary = None if ratio is None else ratio * steps
        self.low_noise_guidance: float | None = None  # None: that of the other expert
        if self.boundary is not None and (pipeline.transformer is None or pipeline.transformer_2 is None):
            raise RunError(f"the policy {name!r} names a boundary between two experts, and has one; accepted: both, transformer and transformer_2")

    def guide_low_noise(self, scale: float) -> None:
        if self.boundary is None:
            super().guide_low_noise(scale)
        self.low_noise_guidance = scale

    def pipeline_options(self) -> dict:
        return {} if self.low_noise_guidance is None else {"guidance_scale_2": self.low_noise_guidance}

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """The expert of high noise first; a LoRA has a file for each (`lora.layouts.wan`)."""
        first = {"": self.pipeline.transformer}
        return first if self.boundary is None else {**first, "transformer_2.": self.pipeline.transformer_2}

    # -- prompts ----------------------------------------------------------------------------------------------------
    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            list(map(str, prompts)), do_classifier_free_guidance=False, max_sequence_length=_LENGTH, device=self.device)
        tensors = {"embeds": embeds.to(self.dtype)}
        if self.pipeline.config.expand_timesteps:
            tensors |= self._first_frames(prompts, size)
        return tensors

    def pipeline_for(self, prompt: str):
        if getattr(prompt, "picture", None) is None or not self.pipeline.config.expand_timesteps or isinstance(self.pipeline, WanImageToVideoPipeline):
            return self.pipeline
        other = WanImageToVideoPipeline(**self.pipeline.components, expand_timesteps=True)  # TI2V-5B is published as a WanPipeline
        other.set_progress_bar_config(disable=True)
        return other

    def _first_frames(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        """first: [P, C, 1, h, w], the latent of each prompt's picture, zero where it has none. given: [P], 1 where it has one."""
        found = [getattr(prompt, "picture", None) and self._vae_encoded(self._pixels(prompt, size)[:, :, None]) for prompt in prompts]
        channels, _, height, width = self.latent_shape(size)
        none = torch.zeros(1, channels, 1, height, width, device=self.device)
        return {"first": torch.cat([none if latent is None else latent for latent in found]),
                "given": torch.tensor([float(latent is not None) for latent in found], device=self.device)}

    def _pixels(self, prompt, size: Size) -> Tensor:
        """The prompt's picture in the size of the video, [1, 3, H, W] in -1..1."""
        return self.pipeline.video_processor.preprocess(reference(prompt, self.name), height=size.height, width=size.width).to(self.device, torch.float32)

    def _vae_encoded(self, video: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._moments()
        return (vae.encode(video.to(vae.dtype)).latent_dist.mode().float() - mean) / std

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Of the VAE's latents, [1, C, 1, 1, 1] each."""
        config = self.pipeline.vae.config
        return tuple(torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))

    # -- sampling ---------------------------------------------------------------------------------------------------
    def own_schedule(self, steps: int, size: Size):
        scheduler = super().own_schedule(steps, size)
        if scheduler.sigmas[0] > 1 - 2e-6:  # UniPC keeps 1e-6 below 1 for the sake of its logarithms; Flow-GRPO's noise is infinite there
            scheduler.sigmas[0] = 1
        return scheduler

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        spatial, temporal = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        multiple_of(size, spatial * self.denoiser.config.patch_size[1], temporal)
        return self.pipeline.vae.config.z_dim, (size.frames - 1) // temporal + 1, size.height // spatial, size.width // spatial

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        """With two experts, each row by its own. Where a micro-batch has rows of both, both see the whole of it: a row's result
        depends on the shape of its batch (DESIGN, one batch shape), never on the rows beside it."""
        if self.boundary is None:
            return self._velocity(self.denoiser, latents, timesteps, tensors, plan)
        high = timesteps >= self.boundary
        apart = processes.sharded() and torch.is_grad_enabled()  # other processes' rows may differ, and all must call the same
        if not apart and (high.all() or not high.any()):
            return self._velocity(self.pipeline.transformer if high.all() else self.pipeline.transformer_2, latents, timesteps, tensors, plan)
        both = [self._velocity(expert, latents, timesteps, tensors, plan) for expert in (self.pipeline.transformer, self.pipeline.transformer_2)]
        return torch.where(high.view(-1, 1, 1, 1, 1), *both)

    def guidance_of(self, timesteps: Tensor, plan: SamplingPlan) -> float | Tensor:
        if self.low_noise_guidance is None:
            return plan.guidance_scale
        scales = torch.where(timesteps >= self.boundary, plan.guidance_scale, self.low_noise_guidance)
        return scales.to(torch.float32).view(-1, 1, 1, 1, 1)

    def _velocity(self, expert: torch.nn.Module, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        if not self.pipeline.config.expand_timesteps:
            return self._call(expert, latents, timesteps, tensors)
        # TI2V-5B: a timestep for each token; those of a given first frame are at 0, without noise
        given = torch.zeros_like(latents[:, :1])
        given[:, :, 0] = tensors["given"].view(-1, 1, 1, 1)
        p_t, p_h, p_w = expert.config.patch_size
        each = ((1 - given[:, 0, ::p_t, ::p_h, ::p_w]) * timesteps.view(-1, 1, 1, 1)).flatten(1)
        first = tensors["first"].to(latents.dtype)
        velocity = self._call(expert, given * first + (1 - given) * latents, each, tensors)
        # a given first frame goes straight to the reference, and nothing is learned from it
        sigma = plan.grid.levels[(plan.grid.timesteps == timesteps[:, None]).int().argmax(1)].view(-1, 1, 1, 1, 1)
        return torch.where(given > 0, (latents - first) / sigma, velocity.to(latents.dtype))

    def _call(self, expert: torch.nn.Module, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return expert(hidden_states=latents.to(self.dtype), timestep=timesteps, encoder_hidden_states=tensors["embeds"], return_dict=False)[0]

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        mean, std = self._moments()
        return pictures(self.pipeline.vae.decode((latents * std + mean).to(self.pipeline.vae.dtype), return_dict=False)[0])


class WanImageToVideo(Wan):
    """The picture's latents, and a mask of where it is, beside the noise; Wan 2.1 sees its CLIP embedding too."""

    pipeline_class = WanImageToVideoPipeline
    needs_picture = True

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        images = [reference(prompt, self.name) for prompt in prompts]
        tensors = super().encode(prompts, size)
        if not self.pipeline.config.expand_timesteps:
            tensors["condition"] = torch.cat([self._condition(prompt, size) for prompt in prompts])
        if self.denoiser.config.image_dim is not None:
            tensors["vision"] = torch.cat([self.pipeline.encode_image(image, self.device) for image in images]).to(self.dtype)
        return tensors

    def _condition(self, prompt, size: Size) -> Tensor:
        """Mask and latents of the picture and the grey frames after it, [1, 4 + C, T, h, w]."""
        unused = torch.empty(0, device=self.device)
        return self.pipeline.prepare_latents(self._pixels(prompt, size), 1, self.pipeline.vae.config.z_dim, size.height, size.width, size.frames,
                                             torch.float32, self.device, latents=unused)[1]

    def _call(self, expert: torch.nn.Module, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        if "condition" in tensors:
            latents = torch.cat([latents, tensors["condition"].to(latents.dtype)], 1)
        return expert(hidden_states=latents.to(self.dtype), timestep=timesteps, encoder_hidden_states=tensors["embeds"],
                      encoder_hidden_states_image=tensors.get("vision"), return_dict=False)[0]
