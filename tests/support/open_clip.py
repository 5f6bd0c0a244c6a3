"""OpenCLIP's CLIP, as its checkpoints store it: tiny random weights under the published names, and its forward written out in float64 from them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, TEXT_WIDTH, LAYERS, HEADS, PATCH, SIDE, DIM = 32, 24, 2, 2, 14, 56, 20


def state_dict(vocabulary: int, positions: int, seed: int = 0) -> dict[str, Tensor]:
    """Float32, in the names and shapes of `open_clip.model.CLIP`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, std=0.2, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    def norm(name, width):
        return {f"{name}.weight": random(width, mean=1.0), f"{name}.bias": random(width)}

    def linear(name, rows, columns):
        return {f"{name}.weight": random(rows, columns), f"{name}.bias": random(rows)}

    def blocks(prefix, width):
        found = {}
        for i in range(LAYERS):
            at = f"{prefix}resblocks.{i}."
            found |= norm(f"{at}ln_1", width) | norm(f"{at}ln_2", width) | linear(f"{at}attn.out_proj", width, width)
            found |= {f"{at}attn.in_proj_weight": random(3 * width, width), f"{at}attn.in_proj_bias": random(3 * width)}
            found |= linear(f"{at}mlp.c_fc", 4 * width, width) | linear(f"{at}mlp.c_proj", width, 4 * width)
        return found

    return {
        "positional_embedding": random(positions, TEXT_WIDTH), "text_projection": random(TEXT_WIDTH, DIM), "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": random(vocabulary, TEXT_WIDTH), **norm("ln_final", TEXT_WIDTH), **blocks("transformer.", TEXT_WIDTH),
        "visual.class_embedding": random(WIDTH), "visual.positional_embedding": random((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": random(WIDTH, DIM), "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH, std=0.05),
        **norm("visual.ln_pre", WIDTH), **norm("visual.ln_post", WIDTH), **blocks("visual.transformer.", WIDTH),
    }


def transformers_config(vocabulary: int, positions: int, eos: int) -> dict:
    """What `config.json` of a transformers folder of that shape says."""
    text = {"vocab_size": vocabulary, "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "max_position_embeddings": positions,
            "bos_token_id": 0, "eos_token_id": eos}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": SIDE, "patch_size": PATCH}
    shared = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    return {"text_config": text | shared, "vision_config": vision | shared, "projection_dim": DIM}


def _norm(weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def _blocks(weights, prefix: str, x: Tensor, causal: bool) -> Tensor:
    n, length, width = x.shape
    for i in range(LAYERS):
        at = f"{prefix}resblocks.{i}."
        qkv = _norm(weights, f"{at}ln_1", x) @ weights[f"{at}attn.in_proj_weight"].T + weights[f"{at}attn.in_proj_bias"]
        q, k, v = (part.view(n, length, HEADS, width // HEADS).transpose(1, 2) for part in qkv.split(width, dim=-1))
        logits = q @ k.transpose(2, 3) / (width // HEADS) ** 0.5
        if causal:
            logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        x = x + attended @ weights[f"{at}attn.out_proj.weight"].T + weights[f"{at}attn.out_proj.bias"]
        hidden = _norm(weights, f"{at}ln_2", x) @ weights[f"{at}mlp.c_fc.weight"].T + weights[f"{at}mlp.c_fc.bias"]
        x = x + F.gelu(hidden) @ weights[f"{at}mlp.c_proj.weight"].T + weights[f"{at}mlp.c_proj.bias"]
    return x


def encode_image(stored: dict[str, Tensor], pixels: np.ndarray) -> np.ndarray:
    """[N, 3, SIDE, SIDE], normalised, to embeddings [N, DIM] of length 1; float64."""
    weights = {name: value.double() for name, value in stored.items()}
    x = torch.from_numpy(pixels).double()
    n, side = len(x), SIDE // PATCH
    patches = x.view(n, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, -1)
    x = patches @ weights["visual.conv1.weight"].flatten(1).T
    x = torch.cat([weights["visual.class_embedding"].expand(n, 1, -1), x], dim=1) + weights["visual.positional_embedding"]
    x = _blocks(weights, "visual.transformer.", _norm(weights, "visual.ln_pre", x), causal=False)
    x = _norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


def encode_text(stored: dict[str, Tensor], ids: list[list[int]]) -> np.ndarray:
    """Token ids, of which the highest ends the text, to embeddings [N, DIM] of length 1; float64."""
    weights = {name: value.double() for name, value in stored.items()}
    x = weights["token_embedding.weight"][torch.tensor(ids)] + weights["positional_embedding"]
    x = _norm(weights, "ln_final", _blocks(weights, "transformer.", x, causal=True))
    x = x[torch.arange(len(ids)), torch.tensor(ids).argmax(-1)] @ weights["text_projection"]
    return (x / x.norm(dim=-1, keepdim=True)).numpy()
