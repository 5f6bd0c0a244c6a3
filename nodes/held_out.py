"""What Evaluate and Watch share: how held-out prompts are drawn."""

from __future__ import annotations

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import host

from . import wires

SAMPLING = {
    "steps": wires.integer(16, 1, 1000, "Denoising steps."),
    "shift": wires.number(3.0, 0.0, 100.0, "Of a flow's time grid; 0 takes what the model's own scheduler says. Diffusion models have none and ignore it.", 0.1),
    "guidance_scale": wires.number(3.5, 0.0, 100.0, "The model's own guidance; without effect where it has none.", 0.1),
    "width": wires.integer(720, 16, 8192, "Pixels.", 8),
    "height": wires.integer(720, 16, 8192, "Pixels.", 8),
    "noise_seed": ("INT", {"default": 1000, "min": 0, "max": 2**63 - 1, "control_after_generate": False, "tooltip": "Of the fixed noise."}),
    "samples_per_prompt": wires.integer(1, 1, 64, "Noises for each prompt; its score is their mean."),
    "batch_size": wires.integer(4, 1, 4096, "Samples in every denoiser call."),
}


def tell_of_seen(title: str, prompts, trained) -> None:
    """Says how many of the prompts were trained on."""
    if seen := len(set(prompts.prompts) & set(trained)):
        host().say(f"{title}: {seen} of its {len(prompts.prompts)} prompts were trained on; its figures flatter the LoRA")


def held_out(policy, prompts, rewards, steps, shift, guidance_scale, width, height, noise_seed, samples_per_prompt, batch_size, frames=1):
    """`runs.evaluate.HeldOut` of these inputs. Rewards that are None are left out. Raises RunError for a size that the policy cannot make."""
    from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
    from comfy_dancegrpo.runs.evaluate import NOISELESS, HeldOut

    size = Size(height, width, frames)
    try:
        policy.latent_shape(size)
    except ValueError as error:
        raise RunError(f'inputs "width", "height" and "frames": {error}') from None
    if line := policy.unseen(prompts.prompts):
        host().say(line)
    plan = SamplingPlan(policy.time_grid(steps, shift, size), NOISELESS[policy.process], 0.0, guidance_scale, size)
    return HeldOut(prompts.prompts, tuple(r for r in rewards if r is not None), plan, noise_seed, batch_size, samples_per_prompt)
