"""CLIP score: how well a picture fits its prompt.

The cosine of CLIP's picture and text embeddings (arXiv 2104.08718, without its factor of 2.5 and its clipping), in -1..1. Takes a
transformers `CLIPModel` folder, as OpenAI and LAION publish theirs, or an OpenCLIP checkpoint (open_clip_pytorch_model.bin) with the
transformers folder of a model of the same shape as its base. The embedded one is GPL-3.0-or-later; OpenAI's and LAION's weights are MIT.
"""

from __future__ import annotations

from . import clip, open_clip
from .base import Source


def load(source: Source) -> clip.Clip:
    if source.model.is_dir():
        folder = source.base or source.model
        return clip.Clip(clip.model(source.model), clip.tokenizer(folder), clip.processor(folder))
    return clip.Clip(open_clip.load(source.model, source.base), clip.tokenizer(source.base), clip.processor(source.base, False), clip.clean)
