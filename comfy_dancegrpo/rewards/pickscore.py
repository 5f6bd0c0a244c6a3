"""PickScore (arXiv 2305.01569): which of two pictures of a prompt people pick, by the Pick-a-Pic set.

The cosine of the picture and text embeddings of a CLIP ViT-H-14 tuned on it, times its learnt scale of about 100: for usual pictures about
17 to 24, as the published code and papers have it. (Flow-GRPO divides it by 26 and DanceGRPO leaves out the scale; advantages are the
same.) Takes the transformers folder yuvalkirstain/PickScore_v1; where a copy of it lacks the tokenizer, name
laion/CLIP-ViT-H-14-laion2B-s32B-b79K, whose it is, as the base. Its code is MIT; its weights are published with no licence named.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import clip
from .base import Source


class PickScore(clip.Clip):
    @torch.no_grad()
    def forward(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.exp() * super().forward(pictures, prompts)


def load(source: Source) -> PickScore:
    folder = source.base or source.model
    return PickScore(clip.model(source.model), clip.tokenizer(folder), clip.processor(folder))
