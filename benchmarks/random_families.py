"""Real families with random weights, in the shapes of their published configurations; prompts are random embeddings, so no text encoder is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import NEGATIVE, Conditioning
from comfy_dancegrpo.policies.base import Policy
from comfy_dancegrpo.policies.flux import Flux
from comfy_dancegrpo.policies.hunyuan_video import HunyuanVideo
from comfy_dancegrpo.policies.stable_diffusion import StableDiffusion
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    UNet2DConditionModel,
)

Encode = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True)
class Cut:
    """Smaller than published, to try the benchmark out: depth, of the first kind of blocks (the others in proportion); heads of the attention, and the
    width with them; tokens of a prompt. None leaves them as they are."""

    depth: int | None = None
    heads: int | None = None
    tokens: int | None = None


def make(name: str, dtype: torch.dtype, device: torch.device, cut: Cut = Cut()) -> tuple[Policy, Encode]:
    """The policy on the device, and what gives each prompt its embeddings there."""
    torch.manual_seed(0)
    with _default(dtype), torch.device(device):
        policy, shapes = {"flux": _flux, "sd15": _sd15, "hunyuan-video": _hunyuan_video}[name](dtype, cut)

    def encode(prompts: Sequence[str]) -> Conditioning:
        rows = [Conditioning({key: torch.randn(1, *shape, generator=generator(key, prompt)).to(device, dtype) for key, shape in shapes.items()})
                for prompt in prompts]
        fixed = {key: value.to(device).expand(len(prompts), *value.shape) for key, value in _FIXED[name](shapes, dtype).items()}
        return Conditioning({**Conditioning.join(rows).tensors, **fixed})

    return policy, encode


_FIXED = {
    # tensors of a prompt that are not embeddings
    "flux": lambda shapes, dtype: {"text_ids": torch.zeros(shapes["embeds"][0], 3, dtype=dtype)},
    "sd15": lambda shapes, dtype: {},
    "hunyuan-video": lambda shapes, dtype: {"mask": torch.ones(shapes["embeds"][0], dtype=dtype)},
}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _flux(dtype: torch.dtype, cut: Cut) -> tuple[Policy, dict]:
    """black-forest-labs/FLUX.1-dev: transformer/config.json and vae/config.json."""
    layers = {"num_layers": cut.depth, "num_single_layers": 2 * cut.depth} if cut.depth else {}
    transformer = FluxTransformer2DModel(guidance_embeds=True, num_attention_heads=cut.heads or 24, **layers)
    vae = _vae(cut, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    pipeline = Flux.pipeline_class(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae, None, None, None, None, transformer)
    return Flux("flux", pipeline, dtype), {"embeds": (cut.tokens or 512, 4096), "pooled": (768,)}


def _sd15(dtype: torch.dtype, cut: Cut) -> tuple[Policy, dict]:
    """stable-diffusion-v1-5/stable-diffusion-v1-5: unet/config.json and vae/config.json."""
    heads = cut.heads or 8
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=heads, layers_per_block=cut.depth or 2,
                                block_out_channels=tuple(40 * heads * k for k in (1, 2, 4, 4)), norm_num_groups=32 if heads == 8 else 8)
    vae = _vae(cut, latent_channels=4)
    with torch.device("cpu"):  # the scheduler's tables stay there
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        pipeline = StableDiffusion.pipeline_class(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
        policy = StableDiffusion("sd15", pipeline, dtype)
    embeds = (cut.tokens or 77, 768)
    return policy, {"embeds": embeds, f"{NEGATIVE}embeds": embeds}


def _hunyuan_video(dtype: torch.dtype, cut: Cut) -> tuple[Policy, dict]:
    """hunyuanvideo-community/HunyuanVideo: transformer/config.json and vae/config.json."""
    layers = {"num_layers": cut.depth, "num_single_layers": 2 * cut.depth, "num_refiner_layers": min(2, cut.depth)} if cut.depth else {}
    transformer = HunyuanVideoTransformer3DModel(num_attention_heads=cut.heads or 24, **layers)
    vae = AutoencoderKLHunyuanVideo(**({"block_out_channels": (32,) * 4, "layers_per_block": 1} if cut.heads else {}))
    pipeline = HunyuanVideo.pipeline_class(None, None, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    return HunyuanVideo("hunyuan-video", pipeline, dtype), {"embeds": (cut.tokens or 256, 4096), "pooled": (768,)}


def _vae(cut: Cut, **config) -> AutoencoderKL:
    """At an eighth of the size, as those of FLUX.1 and of Stable Diffusion 1.5."""
    channels = (32,) * 4 if cut.heads else (128, 256, 512, 512)
    return AutoencoderKL(block_out_channels=channels, layers_per_block=1 if cut.heads else 2, down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4, **config)
