"""The optimizers: one line each. Importing this module imports none of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .learner import OptimizerSettings

# name -> (module, class, pip's name for what is not always installed, options beside the settings)
OPTIMIZERS: dict[str, tuple[str, str, str, dict]] = {
    "adamw": ("torch.optim", "AdamW", "", {}),  # arXiv 1711.05101
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", {}),  # arXiv 2110.02861
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes", {}),  # its state goes to the CPU when memory runs out
    "adafactor": ("transformers", "Adafactor", "", {"scale_parameter": False, "relative_step": False, "warmup_init": False}),  # arXiv 1804.04235
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt", {}),  # arXiv 2306.06101; its learning rate is a factor, and wants to be 1
}
WITHOUT_BETAS = ("adafactor",)
FUSED = "fused"  # torch's name for it, in AdamW's options too
STATE = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "adafactor": 0.1, "prodigy": 16.0}  # bytes for each trained number (8-bit ones rounded up)


def problem(name: str) -> str | None:
    """The line about an optimizer whose package is not installed; None where it is."""
    package = OPTIMIZERS[name][2]
    if package and importlib.util.find_spec(package) is None:
        return f'input "optimizer": found {name!r}, which needs {package}; pip install {package}, or choose another'
    return None


def make(name: str, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Raises `ValueError`, one line, where its package is not installed."""
    from .. import sharding  # and torch

    parameters = list(parameters)
    if line := problem(name):
        raise ValueError(line)
    if name != "adamw" and any(map(sharding.is_part, parameters)):
        raise ValueError(f'input "optimizer": found {name!r}, accepted with sharded weights: \'adamw\', whose steps do not mix the parts')
    module, cls, _, options = OPTIMIZERS[name]
    if name == "adamw" and parameters and all(p.device.type == "cuda" for p in parameters):
        options = {FUSED: True}  # one kernel for all parameters; elsewhere torch's own choice
    betas = {} if name in WITHOUT_BETAS else {"betas": settings.betas}
    return getattr(importlib.import_module(module), cls)(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, **betas, **options)
