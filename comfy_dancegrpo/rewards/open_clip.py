"""OpenCLIP's checkpoints (github.com/mlfoundations/open_clip) as transformers' `CLIPModel`, key by key."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from .weights import fill, read

# OpenCLIP's name: transformers'. Projections are stored the other way round there.
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_VISION = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
_TOWERS = {"transformer.resblocks.": "text_model.encoder.layers.", "visual.transformer.resblocks.": "vision_model.encoder.layers."}


def load(file: Path, base: Path) -> CLIPModel:
    """In float32; `base` is the transformers folder of a model of the same shape, whose configuration alone is read.

    Raises `RunError` where the file is not an OpenCLIP checkpoint of that shape.
    """
    config = CLIPConfig.from_pretrained(base, local_files_only=True)
    return fill(lambda: CLIPModel(config), converted(read(file)), file).float()


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in transformers' names; a name that OpenCLIP's CLIP does not have stays as it is."""
    found = {}
    for name, value in tensors.items():
        if name == "attn_mask":  # the causal mask, which early versions saved
            continue
        if name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = value.T.contiguous()
            continue
        found.update(_of_block(name, value) or {(_TEXT | _VISION).get(name, name): value})
    return found


def _of_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """Of a transformer's block; empty for any other name."""
    for own, other in _TOWERS.items():
        if name.startswith(own):
            number, _, rest = name.removeprefix(own).partition(".")
            part, _, kind = rest.rpartition(".")
            if part in _BLOCK:
                return {f"{other}{number}.{_BLOCK[part]}.{kind}": value}
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):  # of queries, keys and values, one below the other
                kind = rest.rpartition("_")[2]
                return {f"{other}{number}.self_attn.{which}_proj.{kind}": third.clone() for which, third in zip("qkv", value.chunk(3))}
    return {}
