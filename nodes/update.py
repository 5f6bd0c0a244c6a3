from __future__ import annotations

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.objectives import OBJECTIVES
from comfy_dancegrpo.workflow.host import host

from . import wires


class Update:
    TITLE = "Update"
    DESCRIPTION = "Takes clipped policy-gradient steps: what scored better than its group becomes likelier, what scored worse less."
    SEARCH_ALIASES = ["grpo", "train", "optimizer", "ppo"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.UPDATE,)
    RETURN_NAMES = ("update",)
    OUTPUT_TOOLTIPS = ("What the update did; to Loop End.",)
    FUNCTION = "update"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "policy": wires.socket(wires.LIVE_POLICY, "From Loop Start."),
            "advantages": wires.socket(wires.ADVANTAGES, "From Advantage."),
            "clip_range": wires.number(1e-4, 1e-8, 1.0, "How far the probability ratio may move before it earns nothing more.", 1e-5),
            "train_fraction": wires.number(0.6, 0.01, 1.0, "Share of each picture's steps that is trained, drawn anew: 0.6 for flows, 1 for Stable Diffusion.", 0.05),
            "optimizer_steps": wires.integer(1, 1, 1024, "For each rollout, each on its own share of the trained steps."),
            "max_grad_norm": wires.number(1.0, 1e-6, 1e6, "The gradient is scaled down to this norm.", 0.1),
        }, "optional": {
            "max_skipped_steps": wires.integer(3, 0, 1_000_000, "How many optimizer steps in a row may be skipped because their loss or gradient is NaN "
                                               "or infinite; one more stops the run."),
            "objective": wires.choice(list(OBJECTIVES), "clipped: of the plain ratio. grpo_guard: of a ratio normalised to mean the same at every step "
                                      "(flows). reinforce: nothing is clipped. diffusion_nft, awm: of the finished pictures with fresh noise, however they were sampled."),
            "clip_range_high": wires.number(0.0, 0.0, 10.0, "How far the ratio may rise, where that is more than it may fall; 0: as far as clip_range.", 1e-5),
            "kl_weight": wires.number(0.0, 0.0, 1e6, "Of KL to the policy as it was before training, added to the objective: it holds back from cheating the "
                                      "reward, and costs one more denoiser call.", 0.01),
            "nft_beta": wires.number(1.0, 0.001, 1000.0, "Of diffusion_nft: from the second optimizer step on, how much it pulls back to the policy that sampled.", 0.1),
        }}

    def update(self, policy, advantages, clip_range, train_fraction, optimizer_steps, max_grad_norm, max_skipped_steps=3,
               objective="clipped", clip_range_high=0.0, kl_weight=0.0, nft_beta=1.0):
        from comfy_dancegrpo import processes
        from comfy_dancegrpo.grpo import update as grpo

        def tick(done: int, total: int) -> None:
            processes.check_interrupt()
            host().progress(done, total)

        settings = grpo.UpdateSettings(clip_range, train_fraction, optimizer_steps, max_grad_norm, max_skipped_steps, objective, clip_range_high, kl_weight,
                                       nft_beta)
        host().load(policy.policy)
        try:
            return (grpo.update(policy.learner, advantages, settings, tick),)
        except (ValueError, grpo.NotFinite) as error:
            raise RunError(str(error)) from error
