"""HunyuanVideo's own names (`transformer.double_blocks.N.img_attn_qkv.lora_A.weight`), which ComfyUI reads, and diffusers at the width 3072.

The model's own layers are several of diffusers' in one. A fused layer's A holds its parts' one below the other and its B is
block-diagonal, so it has the sum of their ranks.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
LAYERS = {  # by the model's own name, the layers of diffusers that are its rows, in order
    "double_blocks": {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn_proj": ("attn.to_out.0",),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn_proj": ("attn.to_add_out",),
        "img_mlp.fc1": ("ff.net.0.proj",), "img_mlp.fc2": ("ff.net.2",), "img_mod.linear": ("norm1.linear",),
        "txt_mlp.fc1": ("ff_context.net.0.proj",), "txt_mlp.fc2": ("ff_context.net.2",), "txt_mod.linear": ("norm1_context.linear",),
    },
    "single_blocks": {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation.linear": ("norm.linear",),
    },
}
A, B = ".lora_A.weight", ".lora_B.weight"
_OURS = re.compile(rf"({'|'.join(BLOCKS.values())})\.(\d+)\.(.+)\.lora_([AB])\.weight")
_FILE = re.compile(rf"(?:transformer|diffusion_model)\.({'|'.join(BLOCKS)})\.(\d+)\.(.+)\.lora_([AB])\.weight")


def to_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raises `KeyError` for a module that the layout has no name for, or that lacks one of those it is fused with."""
    native = {(BLOCKS[block], part): (block, name) for block, layers in LAYERS.items() for name, parts in layers.items() for part in parts}
    content = {}
    for key in tensors:
        match = _OURS.fullmatch(key)
        if not match or (match[1], match[3]) not in native:
            raise KeyError(key)
        block, name = native[match[1], match[3]]
        parts = [f"{match[1]}.{match[2]}.{part}.lora_{match[4]}.weight" for part in LAYERS[block][name]]
        fuse = torch.cat if match[4] == "A" else lambda parts: torch.block_diag(*parts)
        content.setdefault(f"transformer.{block}.{match[2]}.{name}.lora_{match[4]}.weight", (fuse, parts))
    return {key: fuse([tensors[part] for part in parts]) for key, (fuse, parts) in content.items()}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Also of files that others trained, whose fused layers have one A for all their parts."""
    found = {}
    for key in tensors:
        match = _FILE.fullmatch(key)
        if not match or match[3] not in LAYERS[match[1]]:
            raise KeyError(key)
        if match[4] == "A":
            parts = LAYERS[match[1]][match[3]]
            split = _split(tensors[key], tensors[key.removesuffix(A) + B], len(parts))
            for part, (a, b) in zip(parts, split):
                module = f"{BLOCKS[match[1]]}.{match[2]}.{part}"
                found |= {module + A: a, module + B: b}
    return found


def _split(a: Tensor, b: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """A and B of each of `count` parts: of the three projections of the attention, each as wide as the input, and of what is left."""
    if count == 1:
        return [(a, b)]
    width = a.shape[1]
    rows = b.split([width] * 3 + [len(b) - 3 * width] * (count - 3))
    if a.shape[0] % count == 0:
        ranks = a.split(len(a) // count)
        blocks = [row.split(len(a) // count, 1)[i] for i, row in enumerate(rows)]
        if torch.equal(torch.block_diag(*blocks), b):
            return list(zip(ranks, blocks))
    return [(a, row) for row in rows]
