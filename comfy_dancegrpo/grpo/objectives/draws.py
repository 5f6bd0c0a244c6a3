"""What objectives of the forward process are given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """B samples with fresh noise. output: what the policy says of them as it is, [B, ...]: the velocity of a flow, epsilon of a diffusion; old: as it was
    when it sampled; target: what would be right. advantages: [B]. noise: [B], the part of noise in each, from 0 to 1 (sigma of a flow). error: [B], by
    how much the x0 that follows from an output is wrong where that is wrong by 1. Gradients are of output.
    """

    output: Tensor
    old: Tensor
    target: Tensor
    advantages: Tensor
    noise: Tensor
    error: Tensor
