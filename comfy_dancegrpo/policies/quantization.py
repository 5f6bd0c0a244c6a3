"""Frozen weights of denoisers in fewer bits, through diffusers' quantisation configs: one line a kind. Importing this imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import RunError

NONE = "none"


@dataclass(frozen=True)
class Kind:
    """package: pip's name of what quantises. bits: of a linear layer's weight, with its scales in blocks or rows rounded up; all else keeps its dtype.
    needs_gpu: whether it does so on a GPU alone."""

    package: str
    bits: float
    needs_gpu: bool = False


KINDS: dict[str, Kind | None] = {
    NONE: None,
    "int8 (torchao)": Kind("torchao", 8.1),  # weights alone, a scale for each output
    "float8 (torchao)": Kind("torchao", 8.1),  # e4m3 (arXiv 2209.05433)
    "8-bit (bitsandbytes)": Kind("bitsandbytes", 8.1, needs_gpu=True),  # LLM.int8() (arXiv 2208.07339)
    "nf4 (bitsandbytes)": Kind("bitsandbytes", 4.6, needs_gpu=True),  # QLoRA's normal float (arXiv 2305.14314), a scale for each 64
}


def problem(name: str) -> str | None:
    """The line about a kind that is not known, or whose package is not installed; None where all is there."""
    if name not in KINDS:
        return f'input "quantization": found {name!r}, accepted: {", ".join(map(repr, KINDS))}'
    kind = KINDS[name]
    if kind and importlib.util.find_spec(kind.package) is None:
        return f'input "quantization": found {name!r}, which needs {kind.package}; pip install {kind.package}, or choose another'
    return None


def config(name: str, dtype: Any) -> Any:
    """Diffusers' configuration of a component. dtype: the `torch.dtype` that is computed in. Raises `RunError` where it needs a GPU and there is none."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    from .. import processes

    if KINDS[name].needs_gpu and processes.device().type == "cpu":
        raise RunError(f'input "quantization": found {name!r}, which needs a GPU, and there is none; accepted here: '
                       + ", ".join(repr(other) for other, kind in KINDS.items() if not (kind and kind.needs_gpu)))
    if name == "8-bit (bitsandbytes)":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "nf4 (bitsandbytes)":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return TorchAoConfig(_torchao(name))


def options(name: str, components: Iterable[str], dtype: Any) -> dict[str, Any]:
    """What a pipeline's `from_pretrained` is given so that these components are quantised as they are loaded."""
    components = sorted(components)
    if name == NONE or not components:
        return {}
    from diffusers import PipelineQuantizationConfig

    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={component: config(name, dtype) for component in components})}


def apply(name: str, module: Any) -> None:
    """Quantises a loaded module in place. Raises `RunError` for a kind that quantises only what it loads itself."""
    if KINDS[name].package != "torchao":
        raise RunError(f'input "quantization": found {name!r} and a single file, accepted for that: '
                       + ", ".join(repr(other) for other, kind in KINDS.items() if kind is None or kind.package == "torchao") + "; or a diffusers folder")
    from torch import nn
    from torchao.quantization import quantize_

    exact = set(module._keep_in_fp32_modules or ())  # which diffusers does not quantise either
    quantize_(module, _torchao(name), filter_fn=lambda layer, path: isinstance(layer, nn.Linear) and not exact & set(path.split(".")))


def _torchao(name: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if name.startswith("int8") else Float8WeightOnlyConfig()
