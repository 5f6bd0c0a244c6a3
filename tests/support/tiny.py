"""Tiny random parts of real classes, from which the families under test are put together."""

from __future__ import annotations

import torch
from comfy_dancegrpo.embedded import POLICY
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


def seeded(make, *arguments, seed: int = 0, **options):
    """A module with random weights that depend on the seed alone; zero-initialised ones are made random too, so that each counts."""
    torch.manual_seed(seed)
    module = make(*arguments, **options).eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.numel() and not p.any():
                p.normal_(std=0.02)
    return module


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(POLICY / "tokenizer")


def t5_tokenizer() -> T5TokenizerFast:
    return T5TokenizerFast.from_pretrained(POLICY / "tokenizer_2")


def clip_text(width: int = 32, projection: int | None = None, seed: int = 0, **more):
    """A CLIP text encoder over `clip_tokenizer`; with `projection`, the kind that SDXL and SD3 have two of."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
                            projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)
    return seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed=seed)


def t5_encoder(width: int = 32, seed: int = 1):
    """A T5 encoder over `t5_tokenizer`."""
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return seeded(T5EncoderModel, config, seed=seed)
