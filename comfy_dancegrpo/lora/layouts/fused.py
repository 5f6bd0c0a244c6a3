"""Layers of a model's own that are several of diffusers' in one, as rows one below the other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"
Layers = Mapping[str, Mapping[str, tuple[str, ...]]]  # by stack of blocks, by the own name of a layer, the layers of diffusers in it, in order


def from_file(tensors: dict[str, Tensor], blocks: Mapping[str, str], layers: Layers) -> dict[str, Tensor]:
    """In diffusers' names, also of files that others trained, whose fused layers have one A for all their parts.

    blocks: the model's own names of its stacks of blocks, and diffusers'. Raises `KeyError` with a key that is none of these.
    """
    own = re.compile(rf"(?:transformer|diffusion_model)\.({'|'.join(blocks)})\.(\d+)\.(.+)\.lora_([AB])\.weight")
    found = {}
    for key in tensors:
        match = own.fullmatch(key)
        if not match or match[3] not in layers[match[1]]:
            raise KeyError(key)
        if match[4] == "A":
            parts = layers[match[1]][match[3]]
            a, b = tensors[key], tensors[key.removesuffix(A) + B]
            for part, (part_a, part_b) in zip(parts, separate(a, b, rows(len(b), a.shape[1], len(parts)))):
                module = f"{blocks[match[1]]}.{match[2]}.{part}"
                found |= {module + A: part_a, module + B: part_b}
    return found


def rows(height: int, width: int, count: int) -> list[Tensor]:
    """Of each of `count` parts: of the three projections of the attention, each as wide as the input, and of what is left."""
    return list(torch.arange(height).split([height] if count == 1 else [width] * 3 + [height - 3 * width] * (count - 3)))


def separate(a: Tensor, b: Tensor, rows: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each part, which has these rows of b; where b is block-diagonal, each part gets back the A that was its own."""
    count = len(rows)
    rank = len(a) // count
    if count > 1 and len(a) % count == 0:
        others = [torch.cat([b[row, :i * rank], b[row, (i + 1) * rank:]], 1) for i, row in enumerate(rows)]
        if not any(other.any() for other in others):
            return [(a[i * rank:(i + 1) * rank], b[row, i * rank:(i + 1) * rank]) for i, row in enumerate(rows)]
    return [(a, b[row]) for row in rows]
