"""Qwen-Image (arXiv 2508.02324): a rectified flow with true classifier-free guidance, whose norm is set back to the prompted side's.

Layouts of diffusers: `QwenImagePipeline`, and for pictures to be edited `QwenImageEditPipeline` and `QwenImageEditPlusPipeline` (2509, 2511).
Published for the model: guidance 4, 50 steps, and " " as the prompt to lead away from; for DanceGRPO (arXiv 2505.07818, its scripts):
720x720, 20 steps, shift 3, groups of 12, editing 512x512 and groups of 8. A guidance of 1 is none.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torch import Tensor
from transformers import ProcessorMixin, Qwen2VLProcessor

from ..grpo.protocol import SamplingPlan, Size
from .base import Policy, multiple_of, pictures, reference

_BLOCKS = r"transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(img|txt)_mlp\.net\.(0\.proj|2)"
_MODULATION = r"(img|txt)_mod\.1"


class QwenImage(Policy):
    pipeline_class = QwenImagePipeline
    classifier_free = True
    negative_text = " "
    diffusers_from = "0.37"  # before, the transformer did not heed the mask, and asked for txt_seq_lens (diffusers pull request 12702)
    lora_targets = {
        "attention": f"{_BLOCKS}{_ATTENTION}",
        "attention and feed-forward": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
        "all linear layers": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD}|{_MODULATION})",
    }

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=512)  # the pipeline's
        return {"embeds": embeds, "mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device) if mask is None else mask}

    def own_schedule(self, steps: int, size: Size):
        return self.schedule_by_tokens(steps, self.latent_shape(size)[0])

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        rows, columns = self._patches(size.height, size.width)
        multiple_of(size, self.pipeline.vae_scale_factor * 2)
        return rows * columns, self.denoiser.config.in_channels

    def _patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of 2x2 latent patches."""
        patch = self.pipeline.vae_scale_factor * 2
        return height // patch, width // patch

    def _velocity(self, tokens: Tensor, timesteps: Tensor, embeds: Tensor, mask: Tensor | None, shapes: list[tuple[int, int]]) -> Tensor:
        """tokens [B, L, C] of pictures of `shapes` (rows, columns), the one that is made first; returns its velocity [B, L, C]."""
        return self.denoiser(hidden_states=tokens.to(self.dtype), timestep=timesteps.to(self.dtype) / 1000, encoder_hidden_states=embeds,
                             encoder_hidden_states_mask=mask, img_shapes=[[(1, *shape) for shape in shapes]] * len(tokens),
                             return_dict=False)[0][:, :shapes[0][0] * shapes[0][1]]

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        # the mask also where it is all ones: kernels round differently without one
        return self._velocity(latents, timesteps, tensors["embeds"], tensors["mask"], [self._patches(plan.size.height, plan.size.width)])

    def guide(self, positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        combined = super().guide(positive, negative, scale)
        return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(latents.to(vae.dtype), plan.size.height, plan.size.width, self.pipeline.vae_scale_factor)
        mean, std = (torch.tensor(values, device=unpacked.device, dtype=unpacked.dtype).view(1, -1, 1, 1, 1)
                     for values in (vae.config.latents_mean, vae.config.latents_std))
        return pictures(vae.decode(unpacked * std + mean, return_dict=False)[0])


class PictureProcessor(Qwen2VLProcessor):
    """Without the processor of videos, which wants torchvision; else as saved."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class QwenImageEdit(QwenImage):
    """Makes a picture of any size from a reference picture, which it sees twice: read by Qwen2.5-VL with the prompt, and as latents.

    reference_area, prompt_area: to which the picture is scaled for the one and the other, in pixels, its ratio kept.
    """

    pipeline_class = QwenImageEditPipeline
    needs_picture = True
    reference_area = 1024 * 1024
    prompt_area = 1024 * 1024

    @classmethod
    def load(cls, name: str, folder: Path, dtype: str, **components) -> Policy:
        processor = PictureProcessor.from_pretrained(folder / "processor", local_files_only=True)
        return super().load(name, folder, dtype, **{"processor": processor} | components)

    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        rows = [self._encode(prompt) for prompt in prompts]
        padded = {name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True) for name in ("embeds", "reference")}
        return {**padded, **{name: torch.stack([row[name] for row in rows]) for name in ("length", "shape")}}

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        image = reference(prompt, self.name)
        (width, height), (prompt_width, prompt_height) = (
            pipeline_qwenimage_edit.calculate_dimensions(area, image.width / image.height)[:2] for area in (self.reference_area, self.prompt_area))
        processor = self.pipeline.image_processor
        embeds, _ = self.pipeline.encode_prompt(prompt=[prompt], image=[processor.resize(image, prompt_height, prompt_width)], device=self.device)
        pixels = processor.preprocess(image, height, width).unsqueeze(2).to(self.device, self.pipeline.vae.dtype)
        latents = self.pipeline._encode_vae_image(pixels, None)
        packed = self.pipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[-2:])
        return {"embeds": embeds[0], "reference": packed[0], "length": torch.tensor(embeds.shape[1]),
                "shape": torch.tensor(self._patches(height, width))}

    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        # a call for each sample: the model takes one shape of reference in a batch
        target = self._patches(plan.size.height, plan.size.width)
        rows = zip(latents, timesteps, tensors["embeds"], tensors["reference"], tensors["length"].tolist(), tensors["shape"].tolist(), strict=True)
        return torch.cat([
            self._velocity(torch.cat([x, given[:h * w].to(x.dtype)])[None], t[None], embeds[None, :length], None, [target, (h, w)])
            for x, t, embeds, given, length, (h, w) in rows])


class QwenImageEditPlus(QwenImageEdit):
    pipeline_class = QwenImageEditPlusPipeline
    prompt_area = 384 * 384
