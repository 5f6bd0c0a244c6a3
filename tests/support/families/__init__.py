"""The families under test: a module each, with `CASES`; tests/test_families.py runs every check on every case."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from comfy_dancegrpo.grpo.protocol import Size

PROMPTS = ("a large red circle in the center on a white background", "a small blue star at the top left")


@dataclass(frozen=True)
class Drawing:
    """What a pipeline is asked to draw: a picture for each prompt, from the given latents (in the policy's own shape)."""

    prompts: tuple[str, ...]
    latents: torch.Tensor
    size: Size
    steps: int
    guidance_scale: float


def draw(pipeline, asked: Drawing, **more) -> np.ndarray:
    """By a text-to-image pipeline whose latents are the policy's: [N, H, W, 3] in 0..1."""
    return pipeline(prompt=list(asked.prompts), latents=asked.latents, height=asked.size.height, width=asked.size.width,
                    num_inference_steps=asked.steps, guidance_scale=asked.guidance_scale, output_type="np", **more).images


@dataclass(frozen=True)
class Case:
    """One family, in its real classes, tiny and with random weights.

    build: makes the pipeline as diffusers saves it; weights keyed by a seed. draw: the pipeline's own pictures, with a first-order
    scheduler on its own sigmas where its own is of a higher order. odd: a size that the family must refuse. lora_keys: regular
    expressions of which each key of a saved LoRA matches one, as ComfyUI reads them (source beside them).
    """

    name: str
    build: Callable[[], object]
    lora_keys: tuple[str, ...]
    draw: Callable[[object, Drawing], np.ndarray] = draw
    prompts: tuple[str, ...] = PROMPTS
    size: Size = Size(64, 64)
    odd: Size = Size(64, 60)
    steps: int = 3
    guidance_scale: float = 4.0
    guidance_matters: bool = True
    transition: str = "dance_sde"
    targets: str = "all linear layers"


def cases() -> list[Case]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return [case for module in modules for case in module.CASES]
