"""`dancegrpo sample`: pictures or videos by a policy and a LoRA file, without a graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_dancegrpo.errors import RunError, WorkflowError
from comfy_dancegrpo.policies.places import Parts
from comfy_dancegrpo.policies.quantization import NONE

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "samples/sample"


@dataclass(frozen=True)
class Wanted:
    """What to draw. prompts_file: as Prompt Set takes it. lora: a file that we saved, or None for the base model. parts, quantization: as
    Load Policy takes them. fps: frames a second of a video's file."""

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
    parts: Parts = Parts()
    quantization: str = NONE
    fps: float = 16.0


def draw_and_save(wanted: Wanted) -> list[Path]:
    """Draws with the active host's folders. Returns the files written, one a sample: .png of a picture, .mp4 of several frames.

    Raises `WorkflowError` for what cannot be drawn, and `RunError` for what cannot be loaded.
    """
    from comfy_dancegrpo import policies, prompts
    from comfy_dancegrpo.grpo.protocol import Size
    from comfy_dancegrpo.lora import files
    from comfy_dancegrpo.lora.adapter import applied
    from comfy_dancegrpo.runs.draw import draw

    texts = (*wanted.prompts, *(prompts.read(wanted.prompts_file) if wanted.prompts_file else ()))
    if not texts:
        raise WorkflowError("found no prompt, accepted: --prompt TEXT or --prompts FILE")
    if wanted.lora is not None and not wanted.lora.is_file():
        raise WorkflowError(f"--lora: found {wanted.lora}, which is not a file")
    if wanted.dtype not in policies.DTYPES:
        raise WorkflowError(f"--dtype: found {wanted.dtype!r}, accepted: {', '.join(policies.DTYPES)}")
    with _faults_name_options():
        policy = policies.load(wanted.policy, wanted.dtype, wanted.parts, guidance_scale_2=wanted.guidance_scale_2, quantized=wanted.quantization)
    size = Size(wanted.height, wanted.width, wanted.frames)
    try:
        policy.latent_shape(size)
    except ValueError as error:
        raise WorkflowError(f"--width, --height, --frames: {error}") from error
    with contextlib.ExitStack() as stack:
        if wanted.lora is not None:
            stack.enter_context(applied(policy, files.load(wanted.lora, policy)))
        return [_save(sample, wanted.fps) for sample in draw(policy, texts, size, wanted.steps, wanted.guidance_scale, wanted.seed, wanted.count)]


def _save(sample: Tensor, fps: float) -> Path:
    """Of a picture [H, W, 3] or a video [F, H, W, 3], as the nodes do that save them."""
    from comfy_dancegrpo.nodes.comfy_core import SaveImage
    from comfy_dancegrpo.nodes.save_video import SaveVideo
    from comfy_dancegrpo.workflow.host import host

    if sample.ndim == 4:
        return Path(SaveVideo().save(sample, fps, PREFIX)["ui"]["text"][0])
    (saved,) = SaveImage().save(sample[None], PREFIX)["ui"]["images"]
    return host().output_folder / saved["subfolder"] / saved["filename"]


@contextlib.contextmanager
def _faults_name_options() -> Iterator[None]:
    """Has the faults in the block name the command's options, where they name Load Policy's inputs."""
    try:
        yield
    except RunError as error:
        error.args = (re.sub(r'\binput "(\w+)"', lambda found: "--" + found[1].replace("_", "-"), str(error)),)
        raise
