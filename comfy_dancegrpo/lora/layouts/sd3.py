"""Stable Diffusion 3's own names (`diffusion_model.joint_blocks.N.x_block.attn.qkv.lora_A.weight`), which are read and never written.

The rows of the last block's modulation of the text are shift and scale there, and scale and shift in diffusers.
"""

from __future__ import annotations

from torch import Tensor

from . import fused

BLOCKS = {"joint_blocks": "transformer_blocks"}
LAYERS = {"joint_blocks": {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = fused.from_file(tensors, BLOCKS, LAYERS)
    for name, b in found.items():
        width = found[name.replace(".lora_B.", ".lora_A.")].shape[1]
        if name.endswith("norm1_context.linear" + fused.B) and len(b) == 2 * width:
            found[name] = b.roll(width, 0)
    return found
