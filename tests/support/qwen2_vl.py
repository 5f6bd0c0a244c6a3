"""A tiny random Qwen2-VL in its publishers' form, and its forward pass written out in float64 from the published names."""

from __future__ import annotations

import json

import numpy as np
import torch
from tiny import QWEN_TOKENS, byte_bpe

WIDTH, HEADS, KEYS, LAYERS, INNER = 32, 4, 2, 2, 48  # of the language model; a head is 8 wide
SEEN, SEEN_HEADS, BLOCKS = 32, 2, 2  # of the vision tower, whose heads are 16 wide
# chat_template of Qwen/Qwen2-VL-2B-Instruct (Apache-2.0), for one message
CHAT = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
        "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}{% if content['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def save_base(folder, words: str):
    """The configuration, flat as the publishers wrote it, and a tokenizer that has learnt these words. Returns the tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = byte_bpe([words], QWEN_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": WIDTH, "intermediate_size": INNER, "max_position_embeddings": 32768, "max_window_layers": LAYERS,
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KEYS, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 1000,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vision_config": {"depth": BLOCKS, "embed_dim": SEEN, "mlp_ratio": 2, "num_heads": SEEN_HEADS, "in_chans": 3, "hidden_size": WIDTH,
                          "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}}))
    return tokenizer


def tensors(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random ones, by the names of transformers 4.45, under which the reward models were published."""
    draw, made = torch.Generator().manual_seed(0), {}

    def linear(name, rows, columns, bias=True):
        made[f"{name}.weight"] = torch.randn(rows, columns, generator=draw) / columns**0.5
        if bias:
            made[f"{name}.bias"] = torch.randn(rows, generator=draw) * 0.1

    def norm(name, width, bias=True):
        made[f"{name}.weight"] = 1 + torch.randn(width, generator=draw) * 0.1
        if bias:
            made[f"{name}.bias"] = torch.randn(width, generator=draw) * 0.1

    made["visual.patch_embed.proj.weight"] = torch.randn(SEEN, 3, 2, 14, 14, generator=draw) / 34
    for block in (f"visual.blocks.{k}." for k in range(BLOCKS)):
        norm(f"{block}norm1", SEEN)
        norm(f"{block}norm2", SEEN)
        linear(f"{block}attn.qkv", 3 * SEEN, SEEN)
        linear(f"{block}attn.proj", SEEN, SEEN)
        linear(f"{block}mlp.fc1", 2 * SEEN, SEEN)
        linear(f"{block}mlp.fc2", SEEN, 2 * SEEN)
    norm("visual.merger.ln_q", SEEN)
    linear("visual.merger.mlp.0", 4 * SEEN, 4 * SEEN)
    linear("visual.merger.mlp.2", WIDTH, 4 * SEEN)
    made["model.embed_tokens.weight"] = torch.randn(vocabulary, WIDTH, generator=draw)
    for layer in (f"model.layers.{k}." for k in range(LAYERS)):
        linear(f"{layer}self_attn.q_proj", WIDTH, WIDTH)
        linear(f"{layer}self_attn.k_proj", KEYS * 8, WIDTH)
        linear(f"{layer}self_attn.v_proj", KEYS * 8, WIDTH)
        linear(f"{layer}self_attn.o_proj", WIDTH, WIDTH, bias=False)
        linear(f"{layer}mlp.gate_proj", INNER, WIDTH, bias=False)
        linear(f"{layer}mlp.up_proj", INNER, WIDTH, bias=False)
        linear(f"{layer}mlp.down_proj", WIDTH, INNER, bias=False)
        norm(f"{layer}input_layernorm", WIDTH, bias=False)
        norm(f"{layer}post_attention_layernorm", WIDTH, bias=False)
    norm("model.norm", WIDTH, bias=False)
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    return made


def states(weights: dict[str, torch.Tensor], ids: list[int], pad: int, frames: np.ndarray) -> torch.Tensor:
    """The last states [tokens, WIDTH] of a sequence in which `pad` stands for what is seen: frames [2t, 3, h, w], whole numbers to 255.

    The frequencies of the rotary embeddings have the precision of the weights, as a model has that is cast as a whole."""
    precision = weights["model.embed_tokens.weight"].dtype
    w = {name: value.double() for name, value in weights.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def layer_norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rms_norm(name, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def turned(x, angles):
        """x [tokens, heads, 2n] turned by angles [tokens, n]: the first half against the second."""
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(q, k, v, causal):
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf) if causal else scores
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (frames.astype(np.float64) / 255 - mean[:, None, None]) / std[:, None, None]
    rows, columns = frames.shape[2] // 14, frames.shape[3] // 14
    places = [(2 * r + i, 2 * c + j) for r in range(rows // 2) for c in range(columns // 2) for i in range(2) for j in range(2)]
    frequencies = (1e4 ** -(torch.arange(4).double() / 4)).to(precision).double()
    angles = torch.tensor(places).double()[:, :, None] * frequencies  # of the row, then of the column
    seen = []
    for t in range(0, len(frames), 2):  # frames are attended to two by two
        patches = np.stack([pixels[t:t + 2, :, 14 * r:14 * r + 14, 14 * c:14 * c + 14].transpose(1, 0, 2, 3).ravel() for r, c in places])
        x = torch.from_numpy(patches) @ w["visual.patch_embed.proj.weight"].flatten(1).T
        for block in (f"visual.blocks.{k}." for k in range(BLOCKS)):
            q, k, v = linear(f"{block}attn.qkv", layer_norm(f"{block}norm1", x)).unflatten(1, (3, SEEN_HEADS, -1)).unbind(1)
            x = x + linear(f"{block}attn.proj", attend(turned(q, angles.flatten(1)), turned(k, angles.flatten(1)), v, False))
            y = linear(f"{block}mlp.fc1", layer_norm(f"{block}norm2", x))
            x = x + linear(f"{block}mlp.fc2", y * (1.702 * y).sigmoid())
        x = layer_norm("visual.merger.ln_q", x).reshape(-1, 4 * SEEN)
        seen.append(linear("visual.merger.mlp.2", torch.nn.functional.gelu(linear("visual.merger.mlp.0", x))))

    ids = torch.tensor(ids)
    x = w["model.embed_tokens.weight"][ids].clone()
    x[ids == pad] = torch.cat(seen)
    angles = torch.arange(len(ids)).double()[:, None] * (1e6 ** -(torch.arange(4).double() / 4)).to(precision).double()
    for layer in (f"model.layers.{k}." for k in range(LAYERS)):
        y = rms_norm(f"{layer}input_layernorm", x)
        q, k, v = (linear(f"{layer}self_attn.{name}_proj", y).unflatten(1, (-1, 8)) for name in "qkv")
        k, v = (each.repeat_interleave(HEADS // KEYS, 1) for each in (turned(k, angles), v))
        x = x + linear(f"{layer}self_attn.o_proj", attend(turned(q, angles), k, v, True))
        y = rms_norm(f"{layer}post_attention_layernorm", x)
        x = x + linear(f"{layer}mlp.down_proj", torch.nn.functional.silu(linear(f"{layer}mlp.gate_proj", y)) * linear(f"{layer}mlp.up_proj", y))
    return rms_norm("model.norm", x)


def tokens(tokenizer, kind: str, text: str, count: int) -> list[int]:
    """Of one message with a picture or a video ("image", "video") and a text, as the publishers' processor makes them."""
    message = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}]
    chat = tokenizer.apply_chat_template(message, chat_template=CHAT, tokenize=False, add_generation_prompt=True)
    return tokenizer(chat.replace(f"<|{kind}_pad|>", f"<|{kind}_pad|>" * count)).input_ids
