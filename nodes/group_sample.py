from __future__ import annotations

from dataclasses import replace

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.noise_steps import BRANCH, MODES, NoiseSteps
from comfy_dancegrpo.grpo.ode_solvers import EULER, ODE_SOLVERS
from comfy_dancegrpo.grpo.transitions import TRANSITIONS
from comfy_dancegrpo.workflow.host import host

from . import wires


class GroupSample:
    TITLE = "Group Sample"
    DESCRIPTION = "Samples a group of pictures for each prompt with a stochastic sampler, and records how likely each step was."
    SEARCH_ALIASES = ["rollout", "sampler", "sde", "ddim"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.ROLLOUT, "IMAGE")
    RETURN_NAMES = ("rollout", "images")
    OUTPUT_TOOLTIPS = ("Trajectories, log-probabilities and pictures.", "Group after group: pictures as one batch, videos as a list, one for each.")
    OUTPUT_IS_LIST = (False, True)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "policy": wires.socket(wires.LIVE_POLICY, "From Loop Start."),
            "prompts": wires.socket(wires.PROMPTS, "From Loop Start: a group is sampled for each."),
            "group_size": wires.integer(12, 1, 1024, "Pictures for each prompt, at least 2; their scores are compared with each other."),
            "steps": wires.integer(16, 2, 1000, "Denoising steps."),
            "transition": wires.choice(list(TRANSITIONS), "How noise enters: dance_sde for flows, ddim for diffusion models. ode (flows): not at all, for Update's diffusion_nft "
                                       "and awm, from independent initial noise."),
            "eta": wires.number(0.3, 0.0, 10.0, "How much noise. Too little, and a group's pictures are all alike; too much, and they are ugly."),
            "shift": wires.number(3.0, 0.0, 100.0, "Of a flow's time grid; 0 takes what the model's own scheduler says. Diffusion models have none and ignore it.", 0.1),
            "guidance_scale": wires.number(3.5, 0.0, 100.0, "The model's own guidance; without effect where it has none.", 0.1),
            "width": wires.integer(720, 16, 8192, "Pixels.", 8),
            "height": wires.integer(720, 16, 8192, "Pixels.", 8),
            "initial_noise": wires.choice(["shared", "independent"], "shared: a group starts from one noise, so that only the steps tell its pictures apart."),
        }, "optional": {
            "frames": wires.FRAMES,
            "noise_steps": wires.choice(list(MODES), "all: every step has noise and may be trained. window: a few steps in a row have. branch: one step of each group has, drawn "
                                        "anew; what comes before it is computed once for the group, and training takes one call for the group."),
            "window_size": wires.integer(4, 1, 1000, "Of the window: steps in a row that have noise."),
            "window_interval": wires.integer(0, 0, 1_000_000, "Of the window: iterations after which it moves on by one step; 0 draws its place anew at each."),
            "noise_share": wires.number(1.0, 0.01, 1.0, "The share of the steps, from the noisiest on, in which the window or the branch may be.", 0.05),
            "ode_solver": wires.choice(list(ODE_SOLVERS), "Of the steps after a group's last with noise, in window and branch. euler: as the others. dpm++ 2m: of second order, "
                                       "nearer to the model's own trajectory for the same calls."),
            "eta_end": wires.number(-1.0, -1.0, 10.0, "eta in the run's last iteration: it moves there in equal steps. -1: it stays as it is."),
        }, "hidden": {"unique_id": "UNIQUE_ID"}}

    def sample(self, policy, prompts, group_size, steps, transition, eta, shift, guidance_scale, width, height, initial_noise, frames=1,
               noise_steps=MODES[0], window_size=4, window_interval=0, noise_share=1.0, ode_solver=EULER, eta_end=-1.0, unique_id=""):
        from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
        from comfy_dancegrpo.grpo.rollout import Request, Work, sample

        family, settings = policy.policy, policy.settings
        if group_size < 2:
            raise RunError(f'input "group_size": found {group_size}, accepted: 2 or more, since a score is compared with the rest of its group')
        if eta_end == 0:
            raise RunError('input "eta_end": found 0.0, accepted: above 0, or -1 for an eta that stays')
        if TRANSITIONS[transition].process != family.process:
            fitting = [t.name for t in TRANSITIONS.values() if t.process == family.process]
            raise RunError(f'input "transition": found {transition!r}, accepted for this policy ({family.process}): {", ".join(map(repr, fitting))}')
        if initial_noise == "shared" and not TRANSITIONS[transition].stochastic:
            raise RunError(f'input "initial_noise": found {initial_noise!r}, accepted where "transition" is {transition!r}: \'independent\', since a group would be one picture')
        if initial_noise == "shared" and eta <= 0:
            raise RunError(f'input "eta": found {eta}, accepted where "initial_noise" is {initial_noise!r}: above 0, since a group would be one picture')
        if noise_steps == BRANCH and initial_noise != "shared":
            raise RunError(f'input "initial_noise": found {initial_noise!r}, accepted where "noise_steps" is {BRANCH!r}: \'shared\', since a group is one until it branches')
        size, noise = Size(height, width, frames), NoiseSteps(noise_steps, window_size, window_interval, noise_share)
        try:
            shape = family.latent_shape(size)
        except ValueError as error:
            raise RunError(f'inputs "width", "height" and "frames": {error}') from None
        now = eta if eta_end < 0 else policy.over_the_run("eta_end", eta, eta_end)
        plan = SamplingPlan(family.time_grid(steps, shift, size), transition, now, guidance_scale, size, ode_solver)
        request = Request(prompts.prompts, group_size, shape, settings.seed, policy.iteration, initial_noise == "shared", settings.micro_batch, noise)
        try:
            own_prompts = Work(request, plan).own_prompts
        except ValueError as error:
            raise RunError(f'input "window_size": {error}') from None

        def tick(done: int, total: int) -> None:
            host().check_interrupt()
            early.check()
            host().progress(done, total)

        with policy.scoring.begin(unique_id, own_prompts) as early:
            host().load(family)
            conditioning = policy.encode(prompts.prompts, size)
            request = replace(request, micro_batch=policy.micro_batch(Work(request, plan), conditioning))
            rollout = sample(family, request, conditioning, plan, policy.learner.version, tick=tick, hand=early.add)
        rollout = replace(rollout, early=early, history=policy.learner.history, over_the_run=policy.over_the_run)
        pictures = rollout.every_picture  # None where only the first process has them: what shows or measures them runs there
        return rollout, [pictures] if pictures is None or pictures.ndim == 4 else list(pictures)
