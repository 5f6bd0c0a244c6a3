"""The families under test: a module each, with `CASES`; tests/test_families.py runs every check on every case."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from comfy_dancegrpo.grpo.protocol import Size
from comfy_dancegrpo.prompts import Prompt, Reference
from record_comfyui_keys import RECORD, pattern

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
    scheduler on its own sigmas where its own is of a higher order. odd: a size that the family must refuse. comfyui: the family
    in tests/data/comfyui_lora_keys.json, which has the keys that ComfyUI reads; or where its ComfyUI has no such model yet, regular expressions of which
    each key of a saved LoRA matches one (source beside them). for_lora: stands in for the case
    where a LoRA is loaded, when diffusers reads its names at the published width alone. load_lora: has the pipeline load a LoRA's files.
    within: a context that all checks run in.
    """

    name: str
    build: Callable[[], object]
    comfyui: str | tuple[str, ...]
    draw: Callable[[object, Drawing], np.ndarray] = draw
    prompts: tuple[str, ...] = PROMPTS
    size: Size = Size(64, 64)
    odd: Size = Size(64, 60)
    steps: int = 3
    guidance_scale: float = 4.0
    guidance_matters: bool = True
    transition: str = "dance_sde"
    targets: str = "all linear layers"
    for_lora: Case | None = None
    load_lora: Callable[[object, list[Path]], None] = lambda pipeline, paths: pipeline.load_lora_weights(*paths)
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def unknown_to_comfyui(self, keys: Iterable[str]) -> list[str]:
        """The keys of a LoRA file that ComfyUI would leave out."""
        if isinstance(self.comfyui, tuple):
            return [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in self.comfyui)]
        known = set(json.loads(RECORD.read_text(encoding="utf-8"))[self.comfyui]["keys"])
        return [key for key in keys if pattern(key) not in known]


def draw_video(pipeline, asked: Drawing, **more) -> np.ndarray:
    """By a video pipeline: [N, F, H, W, 3] in 0..1."""
    return pipeline(prompt=list(asked.prompts), latents=asked.latents, height=asked.size.height, width=asked.size.width,
                    num_frames=asked.size.frames, num_inference_steps=asked.steps, output_type="np",
                    **{"guidance_scale": asked.guidance_scale, **more}).frames


def draw_video_of_picture(pipeline, asked: Drawing, **more) -> np.ndarray:
    """The same by a pipeline that takes one prompt and its picture a call."""
    singles = [dataclasses.replace(asked, prompts=asked.prompts[i: i + 1], latents=asked.latents[i: i + 1]) for i in range(len(asked.prompts))]
    return np.concatenate([draw_video(pipeline, one, image=one.prompts[0].picture.image(), **more) for one in singles])


def pictured() -> tuple[Prompt, ...]:
    """The prompts, each with a picture of its own."""
    def picture(seed: int) -> PIL.Image.Image:
        return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8))

    return tuple(Prompt(text, Reference(f"picture {i}", str(i), partial(picture, i))) for i, text in enumerate(PROMPTS))


def cases() -> list[Case]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return [case for module in modules for case in module.CASES]
