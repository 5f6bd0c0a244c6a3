"""HunyuanVideo's own names (`transformer.double_blocks.N.img_attn_qkv.lora_A.weight`), which ComfyUI reads, and diffusers at the width 3072.

The model's own layers are several of diffusers' in one. A fused layer's A holds its parts' one below the other and its B is
block-diagonal, so it has the sum of their ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from . import fused

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
_IN_MEMORY = (  # as ComfyUI renames them when it loads the model, and the model's own
    (r"(img|txt)_attn\.(qkv|proj)\b", r"\1_attn_\2"), (r"_mlp\.0\b", "_mlp.fc1"), (r"_mlp\.2\b", "_mlp.fc2"), (r"(_mod|\.modulation)\.lin\b", r"\1.linear"))
_OURS = re.compile(rf"({'|'.join(BLOCKS.values())})\.(\d+)\.(.+)\.lora_([AB])\.weight")


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
    """Also of ComfyUI's names for the model in memory."""
    named = {}
    for name, value in tensors.items():
        for theirs, own in _IN_MEMORY:
            name = re.sub(theirs, own, name)
        named[name] = value
    return fused.from_file(named, BLOCKS, LAYERS)


def completed(tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """With zeros for the layers that are fused with those that are there. shapes: of every layer's weight."""
    found = dict(tensors)
    stacks = {diffusers: own for own, diffusers in BLOCKS.items()}
    for key in tensors:
        match = _OURS.fullmatch(key)
        parts = next((parts for parts in LAYERS[stacks[match[1]]].values() if match[3] in parts), ()) if match else ()
        for layer in (f"{match[1]}.{match[2]}.{part}" for part in parts):
            if layer + fused.A not in found:
                height, width = shapes[layer]
                found |= {layer + fused.A: torch.zeros(1, width), layer + fused.B: torch.zeros(height, 1)}
    return found
