"""Drawing with a policy by diffusers' own pipeline and scheduler: what a user of the tuned LoRA will see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..grpo.protocol import Size
from ..policies.base import Policy


def arguments(policy: Policy, prompt: str, size: Size, steps: int, guidance_scale: float) -> dict[str, Any]:
    """What `policy.pipeline_for(prompt)` is called with: its own names for these, and nothing that it does not take."""
    takes = policy.takes(prompt)
    true_cfg = policy.classifier_free and "true_cfg_scale" in takes
    given = {
        "prompt": str(prompt), "height": size.height, "width": size.width, "num_frames": size.frames, "num_inference_steps": steps,
        "max_area": size.height * size.width, "_auto_resize": False,  # without which FLUX.1 Kontext draws, and sees, about 1024x1024
        "true_cfg_scale" if true_cfg else "guidance_scale": guidance_scale,
    }
    if policy.classifier_free:
        given["negative_prompt"] = policy.negative_text
    given |= policy.pipeline_options()
    if getattr(prompt, "picture", None) is not None:
        given["image"] = policy.picture(prompt, size)
    return {name: value for name, value in given.items() if name in takes}


def draw(policy: Policy, prompts: tuple[str, ...], size: Size, steps: int, guidance_scale: float, seed: int,
         samples_per_prompt: int = 1, tick: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Tensor]:
    """Each sample in turn, on the CPU: a picture [H, W, 3] or a video [F, H, W, 3], float32 in 0..1.

    The noise of a prompt's k-th sample is that of `seed + k`, whatever the prompt. Raises `ValueError` for a size that the family
    cannot make, and `RunError` for prompts that it cannot take, before anything is drawn. tick(samples done, samples in all) is called
    before each and after the last; it may raise to stop.
    """
    policy.latent_shape(size)
    for prompt in prompts:
        policy.check([prompt])
        if policy.unseen([prompt]):
            raise RunError(f"found the prompt {str(prompt)!r} with a picture, accepted by {policy.name!r}: prompts without, since it sees none")
    total = len(prompts) * samples_per_prompt
    for n in range(total):
        tick(n, total)
        source = torch.Generator("cpu").manual_seed(seed + n % samples_per_prompt)
        prompt = prompts[n // samples_per_prompt]
        with torch.no_grad(), policy.encoding():
            output = policy.pipeline_for(prompt)(**arguments(policy, prompt, size, steps, guidance_scale), generator=source, output_type="np")
        made = output.images if hasattr(output, "images") else output.frames
        sample = torch.from_numpy(np.asarray(made[0], dtype=np.float32))
        yield sample[0] if sample.ndim == 4 and size.frames == 1 else sample
    tick(total, total)
