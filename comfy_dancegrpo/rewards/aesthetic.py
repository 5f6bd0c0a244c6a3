"""LAION aesthetic: how much people like a picture, whatever it shows; the prompt plays no part.

The "improved aesthetic predictor" (github.com/christophschuhmann/improved-aesthetic-predictor): five linear layers, with nothing between
them, over the picture's embedding of length 1 by OpenAI's CLIP ViT-L/14, trained on ratings from 1 to 10 (SAC, Logos, AVA); usual pictures
get about 4 to 7. Takes sac+logos+ava1-l14-linearMSE.pth, and openai/clip-vit-large-patch14 whole, weights too. The predictor is Apache-2.0,
OpenAI's weights are MIT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import clip, weights
from .base import Source

WIDTHS = (1024, 128, 64, 16, 1)


class Layers(nn.Module):
    """Under the published names: layers.0, 2, 4, 6 and 7; what lay between them was dropout."""

    def __init__(self, width: int):
        super().__init__()
        linear = [nn.Linear(before, after) for before, after in zip((width, *WIDTHS), WIDTHS)]
        self.layers = nn.Sequential(linear[0], nn.Identity(), linear[1], nn.Identity(), linear[2], nn.Identity(), linear[3], linear[4])

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings).squeeze(-1)


class Aesthetic(nn.Module):
    def __init__(self, towers: clip.Clip, layers: Layers):
        super().__init__()
        self.towers, self.layers = towers, layers
        del towers.model.text_model, towers.model.text_projection  # nothing asks them

    @torch.no_grad()
    def forward(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.layers(self.towers.pictures(pictures))


def load(source: Source) -> Aesthetic:
    model = clip.model(source.base)
    layers = weights.fill(lambda: Layers(model.config.projection_dim), weights.read(source.model), source.model).float()
    return Aesthetic(clip.Clip(model, None, clip.processor(source.base, False)), layers)
