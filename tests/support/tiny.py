"""Tiny random parts of real classes, from which the families under test are put together."""

from __future__ import annotations

import torch
from comfy_dancegrpo.embedded import POLICY
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def seeded(make, *arguments, seed: int = 0, **options):
    """A module with random weights that depend on the seed alone; zero-initialised ones are made random too, so that each counts."""
    torch.manual_seed(seed)
    module = make(*arguments, **options).eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.numel() and not p.any():
                p.normal_(std=0.02)
    return module


def certain(convolution, channels: int) -> None:
    """Has a VAE's last convolution before its latents' mean (`channels` of them) and variance name next to no variance: a sample is then the mean."""
    with torch.no_grad():
        convolution.weight[channels:] = 0
        convolution.bias[channels:] = -30


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(POLICY / "tokenizer")


def t5_tokenizer() -> T5TokenizerFast:
    return T5TokenizerFast.from_pretrained(POLICY / "tokenizer_2")


def clip_text(width: int = 32, projection: int | None = None, seed: int = 0, positions: int = 0, **more):
    """A CLIP text encoder over `clip_tokenizer`; with `projection`, the kind that SDXL and SD3 have two of."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=positions or tokenizer.model_max_length,
                            projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)
    return seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed=seed)


def t5_encoder(width: int = 32, seed: int = 1):
    """A T5 encoder over `t5_tokenizer`."""
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return seeded(T5EncoderModel, config, seed=seed)


def autoencoder() -> AutoencoderKL:
    """The embedded policy's: 8 channels at a quarter of the size, with a scale and a shift."""
    return AutoencoderKL.from_pretrained(POLICY / "vae", torch_dtype=torch.float32)


def byte_bpe(texts, special: tuple[str, ...], **options) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as those of Llama 3, Qwen and Mistral, of 512 tokens learnt from `texts`; it pads with special[0], on the right."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], padding_side="right", **options)


def decoder_config(tokenizer, width: int = 32, layers: int = 3) -> dict:
    """Of a language model over `tokenizer`: what the configurations of Llama, Qwen and Mistral have in common."""
    return {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """With Qwen's special tokens and form of chat; it has learnt the words that Qwen-Image's templates put around a prompt."""
    words = ("system user assistant Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
             "the objects and background: key features of the input image, then explain how the user's text instruction should alter or modify "
             "the image. Generate a new image that meets the user's requirements while maintaining consistency with the original input where "
             "appropriate. Picture 1:")
    return byte_bpe([words], QWEN_TOKENS, eos_token="<|im_end|>", chat_template=QWEN_CHAT)


def qwen3_text(width: int = 32):
    """The kind of language model that encodes the prompts of Z-Image and FLUX.2 klein, over `qwen_tokenizer`."""
    return seeded(Qwen3Model, Qwen3Config(**decoder_config(qwen_tokenizer(), width)))


def qwen_vl(width: int = 32):
    """The kind of Qwen2.5-VL that encodes the prompts, and pictures, of Qwen-Image, over `qwen_tokenizer`."""
    tokenizer = qwen_tokenizer()
    text = decoder_config(tokenizer, width, layers=2)
    del text["head_dim"]  # it is width / heads there
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width, "fullatt_block_indexes": [0]}
    places = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
              "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    return seeded(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **{name: tokenizer.convert_tokens_to_ids(token) for name, token in places.items()}))
