"""Wan's own names (`diffusion_model.blocks.N.self_attn.q.lora_A.weight`), which ComfyUI reads and diffusers converts.

Wan 2.2 A14B has two experts, and a file for each: ComfyUI loads one per model, diffusers the second with
`load_lora_weights(path, load_into_transformer_2=True)`.
"""

from __future__ import annotations

import re

from torch import Tensor

PREFIX = "diffusion_model."
_HIGH_FILE, _LOW_FILE = SUFFIXES = "_high_noise", "_low_noise"  # of the experts' files' names
LOW = "transformer_2."  # before the names of the expert of low noise (policies.wan)
_PAIRS = (  # diffusers' names and Wan's, of modules; the same order of words in both
    ("attn1", "self_attn"), ("attn2", "cross_attn"),
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("add_k_proj", "k_img"), ("add_v_proj", "v_img"),
    ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"), ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"), ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"), ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
)


def _renamed(name: str, pairs: dict[str, str]) -> str:
    words = "|".join(re.escape(word) for word in sorted(pairs, key=len, reverse=True))
    return re.sub(rf"(?<![^.])({words})(?![^.])", lambda found: pairs[found[1]], name)


def split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The experts' tensors by what their files' names end in, `LOW` taken off; one file where there is one expert."""
    low = {name.removeprefix(LOW): value for name, value in tensors.items() if name.startswith(LOW)}
    if not low:
        return {"": tensors}
    return {_HIGH_FILE: {name: value for name, value in tensors.items() if not name.startswith(LOW)}, _LOW_FILE: low}


def join(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {(LOW if suffix == _LOW_FILE else "") + name: value for suffix, tensors in parts.items() for name, value in tensors.items()}


def to_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {PREFIX + _renamed(name, dict(_PAIRS)): value for name, value in tensors.items()}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in tensors:
        if not name.startswith(PREFIX):
            raise KeyError(name)
    return {_renamed(name.removeprefix(PREFIX), {native: diffusers for diffusers, native in _PAIRS}): value for name, value in tensors.items()}
