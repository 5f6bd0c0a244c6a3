"""kohya's names for the UNet of Stable Diffusion 1.x, 2.x and SDXL: `lora_unet_down_blocks_0_….lora_down.weight`.

Blocks by diffusers' names, which ComfyUI (`comfy.utils.unet_to_diffusers`) and diffusers (`_convert_unet_lora_key`) both read, for
SDXL too. No alpha key: both take one that is missing for the rank, which is full strength.
"""

from __future__ import annotations

import re

from torch import Tensor

PREFIX = "lora_unet_"
_KINDS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_MODULE = re.compile(rf"(.+)\.({'|'.join(_KINDS)})\.weight")
_KEY = re.compile(rf"{PREFIX}(\w+)\.({'|'.join(_KINDS.values())})\.weight")
# the names of diffusers' modules that have an underscore themselves: it stays where the others become dots
_PART = re.compile(r"(down_blocks|mid_block|up_blocks|transformer_blocks|time_emb_proj|time_embedding|add_embedding|linear_[12]"
                   r"|conv_shortcut|conv_in|conv_out|proj_in|proj_out|to_q|to_k|to_v|to_out|[a-z]+[12]?|\d+)(?:_|$)")


def to_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: _MODULE.fullmatch(name).groups() for name in tensors}
    return {f"{PREFIX}{module.replace('.', '_')}.{_KINDS[kind]}.weight": tensors[name] for name, (module, kind) in parts.items()}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = {file: ours for ours, file in _KINDS.items()}
    named = {}
    for key, value in tensors.items():
        if not (match := _KEY.fullmatch(key)):
            raise KeyError(key)
        module, kind = match.groups()
        parts = _PART.findall(module)
        if "_".join(parts) != module or not parts[0].startswith(("down_blocks", "mid_block", "up_blocks", "conv_", "time_", "add_")):
            raise KeyError(key)  # kohya's other names for SDXL (input_blocks_…) among them
        named[f"{'.'.join(parts)}.{kinds[kind]}.weight"] = value
    return named
