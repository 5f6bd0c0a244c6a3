"""`dancegrpo sample`: pictures or videos by a policy and a LoRA file, without a graph."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from comfy_dancegrpo.errors import WorkflowError


@dataclass(frozen=True)
class Wanted:
    """What to draw. prompts_file: as Prompt Set takes it. lora: a file that we saved, or None for the base model."""

    prompts: tuple[str, ...]
    prompts_file: str
    policy: str
    lora: Path | None
    width: int
    height: int
    frames: int
    steps: int
    guidance_scale: float
    seed: int
    count: int
    dtype: str
    guidance_scale_2: float = 0.0


def draw_and_save(wanted: Wanted) -> list[str]:
    """Draws with the active host's folders. Returns the files written, relative to the output folder; raises WorkflowError for what cannot be drawn."""
    from comfy_dancegrpo import policies, prompts
    from comfy_dancegrpo.grpo.protocol import Size
    from comfy_dancegrpo.lora import files
    from comfy_dancegrpo.lora.adapter import applied
    from comfy_dancegrpo.nodes.comfy_core import SaveImage
    from comfy_dancegrpo.runs.draw import draw

    texts = (*wanted.prompts, *(prompts.read(wanted.prompts_file) if wanted.prompts_file else ()))
    if not texts:
        raise WorkflowError("found no prompt, accepted: --prompt TEXT or --prompts FILE")
    if wanted.lora is not None and not wanted.lora.is_file():
        raise WorkflowError(f"--lora: found {wanted.lora}, which is not a file")
    policy, size = policies.load(wanted.policy, wanted.dtype, guidance_scale_2=wanted.guidance_scale_2), Size(wanted.height, wanted.width, wanted.frames)
    try:
        policy.latent_shape(size)
    except ValueError as error:
        raise WorkflowError(f"--width, --height, --frames: {error}") from error
    written: list[str] = []
    with contextlib.ExitStack() as stack:
        if wanted.lora is not None:
            stack.enter_context(applied(policy, files.load(wanted.lora, policy)))
        for sample in draw(policy, texts, size, wanted.steps, wanted.guidance_scale, wanted.seed, wanted.count):
            saved = SaveImage().save(sample[None] if sample.ndim == 3 else sample, "samples/sample")["ui"]["images"]
            written += [f"{image['subfolder']}/{image['filename']}" for image in saved]
    return written
